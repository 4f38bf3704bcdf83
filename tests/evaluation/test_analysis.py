"""vllm_rvec.evaluation.analysis: sweeps whose truth is known."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

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
    sweep,
    task,
)
from vllm_rvec.errors import ConfigError
from vllm_rvec.evaluation.analysis import analyse
from vllm_rvec.evaluation.report import as_json
from vllm_rvec.evaluation.results import Scope, SweepResults
from vllm_rvec.evaluation.statistics import POWER, needed_problems

if TYPE_CHECKING:
    from vllm_rvec.evaluation.records import Arm

SWEEPS = 200
ALARMS = (2, 21)
"""Of 200 at 5 %: binomial, 99.8 % within."""
MOST_CLAIMS = 13
"""Of 200 at 2.5 %: binomial, 99.9 % under it."""
FOUND = (142, 177)
"""Of 200 at 80 %: binomial, 99.8 % within."""


def everything() -> dict[Arm, Truth]:
    """All kinds of arms, none with an effect."""
    arms = (BASE, PROMPT, *VECTORS, *PROMPTED, MINUS, RANDOM)
    return {arm: Truth() for arm in arms} | {REPEAT: Truth(discordance=0.02)}


def held_out(results: SweepResults) -> float:
    return results.confirmations[0].against_base.p_value


def adjusted(results: SweepResults) -> list[tuple[float, float]]:
    """Raw and adjusted p of every alpha against base, on all problems."""
    names = {arm.name for arm in VECTORS}
    return [
        (one.p_value, one.adjusted_p)
        for one in results.comparisons
        if one.scope == Scope() and one.arm in names and one.reference == BASE.name
        if one.adjusted_p is not None
    ]


def test_without_an_effect_there_are_false_alarms_at_the_nominal_rate() -> None:
    """200 A/A sweeps of four alphas: 5 % by the held-out test and by Holm, 2.5 % claims of a gain.

    Without a correction one of four alphas would be "significant" far more often.
    """
    truths = {arm: Truth() for arm in (BASE, *VECTORS)}
    tasks = [task("aa", 200)]
    confirmed = corrected = raw = claimed = 0
    for seed in range(SWEEPS):
        results = sweep(seed, tasks, truths)
        p_values = adjusted(results)
        confirmed += held_out(results) < 0.05
        corrected += min(p for _, p in p_values) < 0.05
        raw += min(p for p, _ in p_values) < 0.05
        claimed += results.verdict.code == "use_alpha"
    low, high = ALARMS
    assert low <= confirmed <= high
    assert low <= corrected <= high
    assert claimed <= MOST_CLAIMS
    assert raw > high


def test_a_planted_effect_is_found_with_its_planned_power() -> None:
    """200 sweeps with as many held-out problems as `needed_problems` says: found in 80 %."""
    truth = Truth(effect=0.15, discordance=0.25)
    n = needed_problems(truth.effect, truth.discordance, POWER)
    truths = {BASE: Truth(), VECTORS[1]: truth}
    tasks = [task("planted", 2 * n)]
    found = Counter(sweep(seed, tasks, truths).verdict.code for seed in range(SWEEPS))
    low, high = FOUND
    assert low <= found["use_alpha"] <= high


def test_the_better_alpha_is_the_one_recommended() -> None:
    """One alpha of four has an effect: it is chosen, and beats base, prompt and random vector."""
    truths = everything() | {VECTORS[1]: Truth(effect=0.25, discordance=0.3)}
    verdict = sweep(3, [task("one", 400)], truths).verdict
    assert (verdict.code, verdict.arm, verdict.alpha) == ("use_alpha", "v@0.5", 0.5)
    assert "on 200 held-out problems" in verdict.text


def test_counts_are_those_of_the_answers() -> None:
    """Accuracy, tokens, failures and discordant pairs, counted by hand from the same answers."""
    truths = everything() | {VECTORS[0]: Truth(tokens=60, cut_offs=0.3, format_failures=0.2)}
    tasks = [task("a", 60), task("b", 40)]
    answers = answers_of(np.random.default_rng(1), tasks, truths)
    results = analyse(tasks, list(truths), answers, {})
    ours = [one for one in answers if one.arm == "v@0.25" and one.task == "b"]
    base = {one.problem: one.is_correct for one in answers if (one.arm, one.task) == ("base", "b")}
    summary = results.summary(Scope("b"), "v@0.25")
    assert summary.correct == sum(one.is_correct for one in ours)
    assert summary.cut_offs == sum(one.is_cut_off for one in ours) / 40
    assert summary.format_failures == sum(one.is_format_failure for one in ours) / 40
    lengths = [one.completion_tokens for one in ours]
    assert summary.median_tokens == np.median(lengths)
    assert summary.p95_tokens == pytest.approx(np.quantile(lengths, 0.95))
    assert (summary.completion_tokens, summary.prompt_tokens) == (sum(lengths), 40 * 20)
    compared = results.comparison(Scope("b"), "v@0.25", "base")
    assert compared is not None
    assert compared.gained == sum(one.is_correct and not base[one.problem] for one in ours)
    assert compared.lost == sum(base[one.problem] and not one.is_correct for one in ours)
    assert compared.difference == pytest.approx((compared.gained - compared.lost) / 40)


def test_families_have_numbers_of_their_own() -> None:
    """Each family of a task that has several; their problems add up to the task's."""
    results = sweep(1, [task("bbh", 90, 3)], everything())
    scopes = [scope for scope in results.scopes() if scope.family]
    assert [scope.family for scope in scopes] == ["family 0", "family 1", "family 2"]
    assert sum(results.summary(scope, "base").answers for scope in scopes) == 90
    assert results.tasks[0].families == ("family 0", "family 1", "family 2")


def test_noise_is_what_differs_between_base_and_itself() -> None:
    """The repeat's grades and texts, and no more; a repeat that says the same has none."""
    results = sweep(1, [task("a", 300)], everything())
    compared = results.comparison(Scope(), "repeat", "base")
    assert compared is not None
    assert results.noise[0].grades == results.noise[0].texts == compared.discordant
    same = sweep(1, [task("a", 300)], everything() | {REPEAT: Truth(discordance=0.0)})
    assert (same.noise[0].grades, same.noise[0].texts) == (0, 0)


def test_the_order_of_answers_does_not_matter() -> None:
    """Concurrent answers come as they please: the report is the same, byte for byte."""
    tasks, truths = [task("a", 50), task("bbh", 60, 3)], everything()
    answers = answers_of(np.random.default_rng(1), tasks, truths)
    shuffled = [answers[i] for i in np.random.default_rng(2).permutation(len(answers))]
    one, other = (analyse(tasks, list(truths), given, {"seed": 1}) for given in (answers, shuffled))
    assert as_json(one) == as_json(other)


def test_missing_answers_are_left_out_of_both_sides() -> None:
    """Arms are compared on the problems that both answered; the rest is counted as missing."""
    tasks, truths = [task("a", 50)], everything()
    answers = [
        one
        for one in answers_of(np.random.default_rng(1), tasks, truths)
        if not (one.arm == "v@0.5" and int(one.problem) < 10)
        if not (one.arm == "base" and 5 <= int(one.problem) < 15)
    ]
    results = analyse(tasks, list(truths), answers, {})
    compared = results.comparison(Scope(), "v@0.5", "base")
    assert compared is not None
    assert compared.n == 35
    assert results.summary(Scope(), "v@0.5").missing == 10


def test_strangers_and_second_answers_are_not_counted() -> None:
    """Of two answers the later counts; answers of other arms and problems are told, not used."""
    tasks, truths = [task("a", 20)], everything()
    answers = answers_of(np.random.default_rng(1), tasks, truths)
    again = replace(answers[0], completion_tokens=999)
    strangers = [replace(answers[0], arm="x"), replace(answers[0], problem="x")]
    results = analyse(tasks, list(truths), [*answers, *strangers, again], {})
    assert results.not_counted == 3
    plain = analyse(tasks, list(truths), answers, {})
    more = results.summary(Scope(), "base").completion_tokens
    assert more - plain.summary(Scope(), "base").completion_tokens == 999 - 40


def test_no_answers_give_a_report_all_the_same() -> None:
    """A sweep interrupted at once: nothing is known, and that is what it says."""
    results = analyse([task("a", 20)], list(everything()), [], {})
    assert results.verdict.code == "cannot_tell"
    assert results.summary(Scope(), "base").accuracy is None
    assert as_json(results)


def test_two_of_one_name_are_refused() -> None:
    """Arms, tasks and problems are told apart by their names."""
    one = task("a", 2)
    doubled = replace(one, problems=(one.problems[0], one.problems[0]))
    for tasks, arms in (([one], [BASE, BASE]), ([one, one], [BASE]), ([doubled], [BASE])):
        with pytest.raises(ConfigError, match="have the same name"):
            analyse(tasks, arms, [], {})


def test_flips_are_a_bounded_sample_of_both_sides() -> None:
    """At most five gained and five lost for each arm of the vector, from all over the problems."""
    results = sweep(1, [task("a", 200), task("b", 200)], everything())
    counts = Counter((one.arm, one.is_gain) for one in results.flips)
    assert max(counts.values()) == 5
    assert {arm for arm, _ in counts} == {arm.name for arm in (*VECTORS, *PROMPTED)}
    assert {one.task for one in results.flips} == {"a", "b"}
    assert all(one.base != one.answer for one in results.flips)
