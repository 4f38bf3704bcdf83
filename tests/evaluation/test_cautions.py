"""vllm_rvec.evaluation.cautions: each has a sweep that earns it, and one that doesn't."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tests.evaluation.simulation import (
    BASE,
    MINUS,
    PROMPT,
    PROMPTED,
    RANDOM,
    REPEAT,
    VECTORS,
    Truth,
    answers_of,
    arm,
    codes,
    sweep,
    task,
)
from vllm_rvec.evaluation.analysis import analyse
from vllm_rvec.evaluation.records import Arm, ArmKind

if TYPE_CHECKING:
    from vllm_rvec.evaluation.results import SweepResults

GAIN = Truth(effect=0.2, discordance=0.25)
LOSS = Truth(effect=-0.2, discordance=0.25)
LONG_GAIN = Truth(effect=0.2, discordance=0.25, tokens=120)
CALM: dict[Arm, Truth] = {
    BASE: Truth(),
    PROMPT: Truth(),
    REPEAT: Truth(discordance=0.0),
    VECTORS[0]: Truth(effect=0.05, discordance=0.1),
    VECTORS[1]: GAIN,
    VECTORS[2]: Truth(),
    MINUS: Truth(effect=-0.2, discordance=0.25),
    RANDOM: Truth(),
}
"""A gain in the middle of the grid, and nothing to be careful about."""


def calm(**changes: Truth) -> SweepResults:
    by_name = {one.name: one for one in CALM}
    return sweep(7, [task("a", 400)], CALM | {by_name[k]: v for k, v in changes.items()})


def text_of(results: SweepResults, code: str) -> str:
    return " ".join(one.text for one in results.verdict.warnings if one.code == code)


def test_a_clean_sweep_has_no_cautions() -> None:
    """Every control asked, nothing odd: nothing said."""
    results = calm()
    assert results.verdict.code == "use_alpha"
    assert codes(results) == set()


def test_over_thinking_is_longer_answers_without_a_gain() -> None:
    """Three times as long and no better; longer and better is what reasoning looks like."""
    long = Truth(tokens=120)
    results = calm(**{"v@0.75": long, "v@0.5": LONG_GAIN})
    assert codes(results) == {"over_thinking"}
    said = text_of(results, "over_thinking")
    assert "v@0.75 2." in said or "v@0.75 3." in said
    assert "v@0.5 " not in said


def test_collapse_is_a_jump_of_cut_offs_or_of_answers_without_an_answer() -> None:
    """Against base; a small share of either is no collapse."""
    results = calm(**{"v@0.75": Truth(cut_offs=0.3), "-v": Truth(-0.1, format_failures=0.4)})
    assert {"collapse_cut_off", "collapse_format"} <= codes(results)
    assert "v@0.75" in text_of(results, "collapse_cut_off")
    assert "-v" in text_of(results, "collapse_format")
    few = calm(**{"v@0.75": Truth(cut_offs=0.05, format_failures=0.05)})
    assert not codes(few) & {"collapse_cut_off", "collapse_format"}


def test_what_the_prompt_cuts_off_is_not_the_vectors_collapse() -> None:
    """vector+prompt is held against base+prompt."""
    cut = Truth(cut_offs=0.3)
    results = sweep(7, [task("a", 400)], CALM | {PROMPT: cut, PROMPTED[0]: cut})
    assert "v@0.5+prompt" not in text_of(results, "collapse_cut_off")


def test_losses_on_other_tasks_are_shown_beside_the_gain() -> None:
    """The chosen alpha gains over all and loses on one task; the interval says so."""
    truths = CALM | {VECTORS[1]: Truth(0.2, 0.25, by_task={"b": -0.2})}
    results = sweep(7, [task("a", 400), task("b", 150)], truths)
    assert results.verdict.arm == "v@0.5"
    assert text_of(results, "loss_on_task").startswith("b: v@0.5 loses, -")


def test_a_family_that_loses_is_named() -> None:
    """By p values adjusted for how many families there are."""
    truths = {BASE: Truth(), VECTORS[1]: Truth(0.3, 0.35), VECTORS[2]: Truth()}
    tasks = [task("bbh", 400, 5)]
    given = [
        replace(one, grade=replace(one.grade, is_correct=False))
        if one.arm == "v@0.5" and int(one.problem) % 5 == 0
        else one
        for one in answers_of(np.random.default_rng(7), tasks, truths)
    ]
    results = analyse(tasks, list(truths), given, {})
    assert "bbh / family 0: v@0.5 loses" in text_of(results, "loss_on_family")
    assert "family 1" not in text_of(results, "loss_on_family")


def test_controls_that_gain_are_suspicious() -> None:
    """A random vector, and the vector taken away."""
    results = calm(**{"random@1": GAIN, "-v": GAIN})
    assert {"random_gains", "minus_gains"} <= codes(results)


def test_noise_is_told_where_base_differs_from_itself() -> None:
    """With how many answers and grades."""
    results = calm(repeat=Truth(discordance=0.05))
    assert "noise" in codes(results)
    assert f"{results.noise[0].grades:,} of them with another grade" in text_of(results, "noise")


def test_the_best_alpha_at_the_edge_asks_for_a_wider_grid() -> None:
    """At either end, if it helps; beside the smallest lies base, and a single alpha is no grid."""
    assert "above" in text_of(calm(**{"v@0.75": GAIN, "v@0.5": Truth()}), "edge_of_grid")
    negative = arm(ArmKind.VECTOR, -0.5)
    below = CALM | {negative: GAIN, VECTORS[1]: Truth()}
    assert "below" in text_of(sweep(7, [task("a", 400)], below), "edge_of_grid")
    assert "edge_of_grid" not in codes(calm(**{"v@0.25": GAIN, "v@0.5": Truth()}))
    assert "edge_of_grid" not in codes(calm(**{"v@0.5": LOSS, "v@0.25": LOSS, "v@0.75": LOSS}))
    single = sweep(7, [task("a", 400)], {BASE: Truth(), VECTORS[1]: GAIN})
    assert "edge_of_grid" not in codes(single)


def test_controls_that_were_not_asked_are_missed() -> None:
    """Prompt, random vector, repeat."""
    results = sweep(7, [task("a", 100)], {BASE: Truth(), VECTORS[0]: Truth()})
    assert {"no_prompt_arm", "no_random_arm", "no_repeat_arm"} <= codes(results)


def test_answers_that_are_missing_or_strange_are_told() -> None:
    """How many of how many."""
    tasks = [task("a", 100)]
    answers = answers_of(np.random.default_rng(1), tasks, CALM)
    results = analyse(tasks, list(CALM), [*answers[7:], answers[-1]], {})
    assert text_of(results, "incomplete").startswith("7 of 800 answers are missing")
    assert text_of(results, "not_counted").startswith("1 answers are not counted")
