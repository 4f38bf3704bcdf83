"""vllm_rvec.evaluation.confirming: one half chooses, the other confirms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.evaluation.simulation import (
    BASE,
    PROMPT,
    PROMPTED,
    RANDOM,
    VECTORS,
    Truth,
    answer,
    answers_of,
    arm,
    half_of,
    sweep,
    task,
)
from vllm_rvec.evaluation.comparing import nearest_random
from vllm_rvec.evaluation.confirming import choose, confirm_all, power_seen
from vllm_rvec.evaluation.grid import grid_of
from vllm_rvec.evaluation.records import Answer, Arm, ArmKind
from vllm_rvec.evaluation.results import Scope
from vllm_rvec.evaluation.statistics import detectable_effect, needed_problems


def answers_right(arms: dict[Arm, set[int]], problems: int) -> list[Answer]:
    """Answers of which those problems are right."""
    return [
        answer(one.name, "a", str(index), half_of(index), is_correct=index in right)
        for one, right in arms.items()
        for index in range(problems)
    ]


def test_among_equals_the_smallest_alpha_is_chosen() -> None:
    """Whatever its sign and place; of two as small, the positive one."""
    everything = set(range(10))
    for alphas, expected in (((1.0, -0.25, 0.5), -0.25), ((-0.5, 0.5), 0.5), ((0.0, 0.75), 0.75)):
        arms = {arm(ArmKind.VECTOR, alpha): everything for alpha in alphas}
        grid = grid_of([task("a", 10)], list(arms), answers_right(arms, 10))
        chosen = choose(grid, Scope(), ArmKind.VECTOR)
        assert chosen is not None
        assert chosen.alpha == expected


def test_only_the_first_half_chooses_and_only_the_second_confirms() -> None:
    """An arm that shines where it is confirmed is not chosen for it, nor the reverse."""
    even, odd = set(range(0, 20, 2)), set(range(1, 20, 2))
    arms = {BASE: set[int](), VECTORS[0]: even, VECTORS[1]: odd}
    grid = grid_of([task("a", 20)], list(arms), answers_right(arms, 20))
    (found,) = confirm_all(grid)
    assert (found.arm, found.chosen_accuracy, found.candidates) == ("v@0.25", 1.0, 2)
    assert (found.against_base.n, found.against_base.gained) == (10, 0)


def test_a_problem_whose_answers_disagree_on_its_half_is_in_neither() -> None:
    """It would be chosen by and confirmed by."""
    arms = {BASE: set(range(20)), VECTORS[0]: set(range(20))}
    given = [
        replace(one, half="choose") if (one.arm, one.problem) == ("base", "1") else one
        for one in answers_right(arms, 20)
    ]
    (found,) = confirm_all(grid_of([task("a", 20)], list(arms), given))
    assert found.against_base.n == 9


def test_each_task_chooses_for_itself_with_adjusted_p() -> None:
    """Tasks of different taste have different alphas; their p values are adjusted for being two."""
    truths = {
        BASE: Truth(),
        VECTORS[0]: Truth(discordance=0.3, by_task={"a": 0.25, "b": 0.0}),
        VECTORS[3]: Truth(discordance=0.3, by_task={"a": 0.0, "b": 0.25}),
    }
    results = sweep(1, [task("a", 300), task("b", 300)], truths)
    by_scope = {one.scope.task: one for one in results.confirmations}
    assert (by_scope["a"].arm, by_scope["b"].arm) == ("v@0.25", "v@1")
    assert by_scope[""].adjusted_p is None
    for name in ("a", "b"):
        assert (by_scope[name].adjusted_p or 0) >= by_scope[name].against_base.p_value


def test_the_prompted_vector_is_compared_with_the_prompt() -> None:
    """The prompt's gain isn't the vector's: vector+prompt is tested against base+prompt."""
    truths = {one: Truth() for one in (BASE, PROMPT, *VECTORS, *PROMPTED)}
    results = sweep(1, [task("a", 100)], truths)
    assert [one.kind for one in results.confirmations] == [
        ArmKind.VECTOR,
        ArmKind.VECTOR_PROMPT,
    ]
    prompted = results.confirmations[1]
    assert prompted.against_base.reference == "base+prompt"
    assert prompted.against_prompt is prompted.against_random is None


def test_the_random_arm_of_the_nearest_size_is_the_control() -> None:
    """Alpha -1 against random@1, alpha 0.25 against random@0.5; of two alike, the better one."""
    small, other = arm(ArmKind.RANDOM, 0.5), arm(ArmKind.RANDOM, 1.0, "random@1#2")
    minus = arm(ArmKind.VECTOR, -1.0)
    arms = {
        BASE: set[int](),
        VECTORS[0]: {1, 2},
        minus: {1, 2, 3},
        small: set[int](),
        RANDOM: {1},
        other: {1, 2},
    }
    tasks = [task("a", 10)]
    grid = grid_of(tasks, list(arms), answers_right(arms, 10))
    assert nearest_random(grid, VECTORS[0]) == small
    assert nearest_random(grid, minus) == other


def test_without_base_or_halves_nothing_is_confirmed() -> None:
    """No reference, no candidates, no second half: no confirmation, no exception."""
    truths = {one: Truth() for one in (BASE, *VECTORS)}
    tasks = [task("a", 20)]
    given = answers_of(np.random.default_rng(1), tasks, truths)
    chosen = [one for one in given if one.half == "choose"]
    unseen = [one for one in given if one.half == "confirm"]
    for arms, answers in (
        ([*VECTORS], given),
        ([BASE], given),
        ([BASE, *VECTORS], chosen),
        ([BASE, *VECTORS], unseen),
    ):
        assert confirm_all(grid_of(tasks, arms, answers)) == ()


def test_power_is_that_of_the_discordance_seen() -> None:
    """What could be found at this n, and how many problems the effect seen would need."""
    results = sweep(4, [task("a", 400)], {BASE: Truth(), VECTORS[0]: Truth(effect=0.04)})
    compared = results.confirmations[0].against_base
    power = power_seen(compared)
    seen = compared.discordant / 200
    assert power.detectable == pytest.approx(detectable_effect(200, seen))
    assert power.needed == needed_problems(abs(compared.difference), seen)
