"""vllm_rvec.evaluation.verdict: every recommendation, from sweeps whose truth is known."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.evaluation.simulation import (
    BASE,
    PROMPT,
    PROMPTED,
    RANDOM,
    VECTORS,
    Truth,
    answers_of,
    arm,
    sweep,
    task,
)
from vllm_rvec.evaluation.analysis import analyse
from vllm_rvec.evaluation.records import ArmKind

if TYPE_CHECKING:
    from vllm_rvec.evaluation.records import Arm
    from vllm_rvec.evaluation.results import Verdict

GAIN = Truth(effect=0.2, discordance=0.25)
LOSS = Truth(effect=-0.2, discordance=0.25)


def verdict(truths: dict[Arm, Truth], problems: int = 400) -> Verdict:
    return sweep(7, [task("a", problems)], truths).verdict


def test_a_gain_that_beats_every_control_is_recommended() -> None:
    """With the difference and interval against each of them, on how many problems."""
    found = verdict({BASE: Truth(), PROMPT: Truth(), RANDOM: Truth(), VECTORS[1]: GAIN})
    assert found.code == "use_alpha"
    assert found.text.startswith("Use alpha 0.5: +")
    for said in ("against base on 200 held-out problems", "against base+prompt", "random@1"):
        assert said in found.text


def test_an_alpha_is_said_in_all_its_digits() -> None:
    """Rounded, it would be one that nobody tried."""
    found = verdict({BASE: Truth(), arm(ArmKind.VECTOR, 0.12345678): GAIN})
    assert found.text.startswith("Use alpha 0.12345678: +")


def test_a_gain_that_a_prompt_makes_too_is_not_recommended() -> None:
    """In words: asking for steps does as much."""
    found = verdict({BASE: Truth(), PROMPT: GAIN, RANDOM: Truth(), VECTORS[1]: GAIN})
    assert found.code == "prompt_does_as_much"
    assert "Asking for steps in the prompt does as much" in found.text
    assert "random" not in found.text


def test_a_gain_that_any_change_makes_too_is_not_recommended() -> None:
    """In words: a random change of this size does as much."""
    found = verdict({BASE: Truth(), PROMPT: Truth(), RANDOM: GAIN, VECTORS[1]: GAIN})
    assert found.code == "random_does_as_much"
    assert "A random change of this size does as much" in found.text


def test_both_controls_are_named_where_both_do_as_much() -> None:
    """The prompt gives the code, for it costs nothing."""
    found = verdict({BASE: Truth(), PROMPT: GAIN, RANDOM: GAIN, VECTORS[1]: GAIN})
    assert found.code == "prompt_does_as_much"
    assert "base+prompt" in found.text
    assert "random@1" in found.text


def test_a_control_that_is_better_is_said_to_be() -> None:
    """Not "isn't shown to be better": the vector is worse than the prompt."""
    better = Truth(effect=0.45, discordance=0.5)
    found = verdict({BASE: Truth(), PROMPT: better, VECTORS[1]: GAIN})
    assert "it is worse than base+prompt" in found.text


def test_no_gain_says_what_could_have_been_found() -> None:
    """The smallest gain that so many problems would have shown, and how many a gain seen needs."""
    found = verdict({BASE: Truth(), **{arm: Truth(effect=0.02) for arm in VECTORS}})
    assert found.code == "no_gain"
    assert found.text.startswith("No gain that the data shows. Alpha ")
    assert "the best of 4 on the half that chose" in found.text
    assert "would have been found four times out of five" in found.text


def test_so_few_problems_show_nothing_and_it_says_so() -> None:
    """Four held-out problems: not even the largest gain."""
    found = verdict({BASE: Truth(), VECTORS[0]: GAIN}, problems=8)
    assert found.code == "no_gain"
    assert "not even the largest gain would be found" in found.text


def test_a_loss_is_advised_against() -> None:
    """The best of the alphas is worse than base."""
    found = verdict({BASE: Truth(), VECTORS[0]: LOSS})
    assert found.code == "loss"
    assert found.text.startswith("Don't use it: alpha 0.25 loses: -")


@pytest.mark.parametrize(
    ("prompted", "code"),
    [(GAIN, "prompted_gain"), (LOSS, "prompted_loss"), (Truth(), "prompted_no_gain")],
)
def test_the_vector_with_the_prompt_has_a_sentence_of_its_own(prompted: Truth, code: str) -> None:
    """Against base+prompt."""
    found = verdict({BASE: Truth(), PROMPT: Truth(discordance=0.0), PROMPTED[0]: prompted})
    assert found.with_prompt is not None
    assert found.with_prompt.code == code
    assert "against base+prompt" in found.with_prompt.text


def test_what_can_not_be_told_says_why() -> None:
    """No base, no vector, no answers, no first half."""
    tasks = [task("a", 8)]
    assert "no arm of base" in analyse(tasks, [VECTORS[0]], [], {}).verdict.text
    assert "no arm of the vector" in analyse(tasks, [BASE], [], {}).verdict.text
    assert "no answers" in analyse(tasks, [BASE, VECTORS[0]], [], {}).verdict.text
    given = answers_of(np.random.default_rng(1), tasks, {BASE: Truth(), VECTORS[0]: Truth()})
    unseen = [one for one in given if one.half == "confirm"]
    found = analyse(tasks, [BASE, VECTORS[0]], unseen, {}).verdict
    assert (found.code, found.arm) == ("cannot_tell", None)
    assert "no alpha was chosen" in found.text
    lonely = [replace(one, half="choose") for one in given if one.arm != "base"]
    found = analyse(tasks, [BASE, VECTORS[0]], lonely, {}).verdict
    assert "v@0.25 and base answered no problem both" in found.text


def test_without_held_out_problems_the_best_alpha_is_named_and_not_recommended() -> None:
    """All problems choose: the gain with p adjusted for the number of alphas, and a warning.

    What the chosen alpha loses elsewhere is told all the same.
    """
    truths = {
        BASE: Truth(),
        VECTORS[1]: Truth(0.3, 0.35, by_task={"b": -0.2}),
        **dict.fromkeys((VECTORS[0], *VECTORS[2:]), Truth()),
    }
    tasks = [task("a", 300), task("b", 100)]
    given = answers_of(np.random.default_rng(1), tasks, truths)
    results = analyse(tasks, list(truths), [replace(one, half="choose") for one in given], {})
    found = results.verdict
    assert (found.code, found.arm, found.alpha) == ("cannot_tell", "v@0.5", 0.5)
    assert "no problems were held out" in found.text
    assert "The best of 4 is 0.5, +" in found.text
    assert "adjusted for the number of alphas" in found.text
    assert "loss_on_task" in {one.code for one in found.warnings}
