"""Half of the problems choose the alpha, the other half confirm it.

The best of several arms looks better than it is, for luck helped to choose it. So the half that
chose says nothing about the gain; the other half has not been looked at, and there one arm is
tested once, which needs no correction.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_rvec.evaluation.comparing import compare, nearest_random
from vllm_rvec.evaluation.records import ArmKind
from vllm_rvec.evaluation.results import Comparison, Confirmation, Power, Scope
from vllm_rvec.evaluation.statistics import detectable_effect, holm, needed_problems

if TYPE_CHECKING:
    from vllm_rvec.evaluation.grid import Grid
    from vllm_rvec.evaluation.records import Arm

__all__ = ["choose", "confirm_all", "power_seen"]

REFERENCES = {
    ArmKind.VECTOR: ArmKind.BASE,
    ArmKind.VECTOR_PROMPT: ArmKind.BASE_PROMPT,
}
"""With whom a kind of arm is compared: like with like, so that a prompt's gain isn't v's."""


def confirm_all(grid: Grid) -> tuple[Confirmation, ...]:
    """Choose and confirm over all tasks; and for each task, where there are several.

    A task that chooses for itself is one of several that do: their p values are adjusted.
    """
    tasks = [scope for scope in grid.scopes if scope.task and not scope.family]
    found: list[Confirmation] = []
    for kind in REFERENCES:
        found += _confirmed(grid, [Scope()], kind)
        if len(tasks) > 1:
            each = _confirmed(grid, tasks, kind)
            adjusted = holm([one.against_base.p_value for one in each])
            found += [replace(one, adjusted_p=p) for one, p in zip(each, adjusted, strict=True)]
    return tuple(found)


def choose(grid: Grid, scope: Scope, kind: ArmKind) -> Arm | None:
    """The arm with the highest accuracy on the half that chooses.

    Among equals the one with the smallest alpha, whatever its sign: it changes the least.

    Returns:
        None where no arm of this kind was answered in this half.
    """
    columns = grid.columns(scope, "choose")
    rated = [
        (accuracy, arm)
        for arm in grid.of_kind(kind)
        if arm.alpha != 0 and (accuracy := grid.accuracy(arm.name, columns)) is not None
    ]
    best = min(rated, key=lambda pair: (-pair[0], abs(pair[1].alpha), -pair[1].alpha), default=None)
    return None if best is None else best[1]


def power_seen(comparison: Comparison) -> Power:
    """What a comparison of this size could show, and what it would take to show more."""
    n, effect = comparison.n, abs(comparison.difference)
    discordance = comparison.discordant / n if n else 0.0
    return Power(
        n=n,
        discordance=discordance,
        detectable=detectable_effect(n, discordance),
        needed=needed_problems(effect, discordance) if effect else None,
    )


def _confirmed(grid: Grid, scopes: list[Scope], kind: ArmKind) -> list[Confirmation]:
    return [found for scope in scopes if (found := _confirm(grid, scope, kind)) is not None]


def _confirm(grid: Grid, scope: Scope, kind: ArmKind) -> Confirmation | None:
    arm, bases = choose(grid, scope, kind), grid.of_kind(REFERENCES[kind])
    if arm is None or not bases:
        return None
    against_base = compare(grid, scope, arm.name, bases[0].name, "confirm")
    if not against_base.n:
        return None
    prompts = grid.of_kind(ArmKind.BASE_PROMPT) if kind is ArmKind.VECTOR else ()
    control = nearest_random(grid, arm) if kind is ArmKind.VECTOR else None
    return Confirmation(
        scope=scope,
        kind=kind,
        arm=arm.name,
        alpha=arm.alpha,
        candidates=sum(one.alpha != 0 for one in grid.of_kind(kind)),
        chosen_accuracy=grid.accuracy(arm.name, grid.columns(scope, "choose")) or 0.0,
        against_base=against_base,
        against_prompt=_control(grid, scope, arm, prompts[0] if prompts else None),
        against_random=_control(grid, scope, arm, control),
        power=power_seen(against_base),
        adjusted_p=None,
    )


def _control(grid: Grid, scope: Scope, arm: Arm, control: Arm | None) -> Comparison | None:
    if control is None:
        return None
    found = compare(grid, scope, arm.name, control.name, "confirm")
    return found if found.n else None
