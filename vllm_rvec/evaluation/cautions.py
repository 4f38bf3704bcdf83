"""What to know before a sweep's verdict is believed or acted on.

Each caution has a code that stays, for machines; its words may change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vllm_rvec.evaluation.confirming import choose
from vllm_rvec.evaluation.records import ArmKind
from vllm_rvec.evaluation.results import Finding, Scope
from vllm_rvec.evaluation.statistics import holm, paired_interval
from vllm_rvec.evaluation.wording import difference, share, times
from vllm_rvec.vector.alpha import alpha_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm_rvec.evaluation.grid import Flags, Grid
    from vllm_rvec.evaluation.records import Arm
    from vllm_rvec.evaluation.results import Comparison, Confirmation, Noise

__all__ = ["cautions_of"]

MUCH_LONGER = 1.5
"""Times as long: under it, answers vary for many reasons."""

JUMP = 0.1
"""More of all answers cut off, or without anything to grade."""

LEVEL = 0.05


def cautions_of(
    grid: Grid,
    comparisons: Sequence[Comparison],
    confirmations: Sequence[Confirmation],
    noise: Sequence[Noise],
) -> tuple[Finding, ...]:
    """Everything to be careful about, the gravest first."""
    chosen = next(
        (one for one in confirmations if (one.scope, one.kind) == (Scope(), ArmKind.VECTOR)), None
    )
    return (
        *_not_complete(grid),
        *_losses(grid, comparisons),
        *_collapses(grid),
        *_over_thinking(grid, comparisons),
        *_control_gains(grid, comparisons),
        *_noise(noise),
        *_edge(grid, chosen),
        *_no_control(grid),
    )


def _not_complete(grid: Grid) -> Iterator[Finding]:
    missing = grid.answered.size - int(np.count_nonzero(grid.answered))
    if missing:
        yield Finding(
            "incomplete",
            f"{missing:,} of {grid.answered.size:,} answers are missing: arms are compared on the "
            "problems that both answered.",
        )
    if grid.not_counted:
        yield Finding(
            "not_counted",
            f"{grid.not_counted:,} answers are not counted: they are of arms, tasks or problems "
            "that aren't in this sweep, or were given again.",
        )


def _losses(grid: Grid, comparisons: Sequence[Comparison]) -> Iterator[Finding]:
    """Where the chosen arm is worse than base, on all problems.

    A task counts by its own interval: a loss that may be there is worth a look. Families are many,
    so they count by p values adjusted for how many there are.
    """
    chosen, bases = choose(grid, Scope(), ArmKind.VECTOR), grid.of_kind(ArmKind.BASE)
    if chosen is None or not bases:
        return
    ours = [one for one in comparisons if (one.arm, one.reference) == (chosen.name, bases[0].name)]
    lost = [one for one in ours if one.scope.task and not one.scope.family and one.is_loss]
    families = [one for one in ours if one.scope.family]
    adjusted = holm([one.p_value for one in families])
    lost += [
        one
        for one, p_value in zip(families, adjusted, strict=True)
        if one.is_loss and p_value < LEVEL
    ]
    for one in lost:
        yield Finding(
            "loss_on_family" if one.scope.family else "loss_on_task",
            f"{one.scope.label}: {one.arm} loses, {difference(one)} against {one.reference} on all "
            f"{one.n:,} problems.",
        )


def _collapses(grid: Grid) -> Iterator[Finding]:
    for scope in _tasks(grid):
        for code, what, flags in (
            ("collapse_cut_off", "run into max_tokens", grid.cut_offs),
            ("collapse_format", "hold nothing to grade", grid.format_failures),
        ):
            jumps = [
                f"{arm.name} {share(rates[0])} ({reference.name} {share(rates[1])})"
                for arm, reference in _with_references(grid)
                if (rates := _jump(grid, scope, arm, reference, flags)) is not None
            ]
            if jumps:
                yield Finding(code, f"{scope.label}: answers that {what}: {', '.join(jumps)}.")


def _jump(
    grid: Grid, scope: Scope, arm: Arm, reference: Arm, flags: Flags
) -> tuple[float, float] | None:
    """Both rates, where the arm's is higher by a lot, and surely higher."""
    one, other = grid.index(arm.name), grid.index(reference.name)
    both = grid.answered[one] & grid.answered[other] & grid.columns(scope)
    n, ours, theirs = int(np.count_nonzero(both)), flags[one][both], flags[other][both]
    more, fewer = int(np.count_nonzero(ours & ~theirs)), int(np.count_nonzero(theirs & ~ours))
    if not n or more - fewer < JUMP * n:
        return None
    interval = paired_interval(more, fewer, n)
    if interval is None or interval.low <= 0:
        return None
    return int(np.count_nonzero(ours)) / n, int(np.count_nonzero(theirs)) / n


def _over_thinking(grid: Grid, comparisons: Sequence[Comparison]) -> Iterator[Finding]:
    """Where alpha makes answers much longer, and no better."""
    found = {(one.scope, one.arm, one.reference): one for one in comparisons}
    for scope in _tasks(grid):
        longer = [
            (arm, comparison)
            for arm, reference in _with_references(grid)
            if arm.kind in {ArmKind.VECTOR, ArmKind.VECTOR_PROMPT} and arm.alpha > 0
            if _is_longer(comparison := found[scope, arm.name, reference.name])
            if not comparison.is_gain
        ]
        if longer:
            said = "; ".join(
                f"{arm.name} {times(_ratio(comparison))} as long, {difference(comparison)}"
                for arm, comparison in sorted(longer, key=lambda pair: pair[0].alpha)
            )
            yield Finding(
                "over_thinking",
                f"{scope.label}: answers grow much longer without a gain that the data shows "
                f"(over-thinking): {said}.",
            )


def _ratio(comparison: Comparison) -> float:
    return 1.0 if comparison.length_ratio is None else comparison.length_ratio.value


def _is_longer(comparison: Comparison) -> bool:
    ratio = comparison.length_ratio
    if ratio is None or ratio.value < MUCH_LONGER:
        return False
    return ratio.interval is not None and ratio.interval.low > 1


def _control_gains(grid: Grid, comparisons: Sequence[Comparison]) -> Iterator[Finding]:
    for one in comparisons:
        if one.scope != Scope() or not one.is_gain:
            continue
        kinds = [grid.arms[grid.index(name)].kind for name in (one.arm, one.reference)]
        if kinds == [ArmKind.RANDOM, ArmKind.BASE]:
            yield Finding(
                "random_gains",
                f"A random change of the vector's size gains too: {one.arm} {difference(one)} "
                f"against {one.reference}. What the vector gains beyond that is its own.",
            )
        if kinds == [ArmKind.MINUS, ArmKind.BASE]:
            yield Finding(
                "minus_gains",
                f"The vector taken away gains too: {one.arm} {difference(one)} against "
                f"{one.reference}. The direction isn't what matters.",
            )


def _noise(noise: Sequence[Noise]) -> Iterator[Finding]:
    for one in noise:
        if one.texts or one.grades:
            yield Finding(
                "noise",
                f"Base asked twice ({one.arm}) differs from itself in {one.texts:,} of {one.n:,} "
                f"answers, {one.grades:,} of them with another grade: so much of what any arm "
                "changes is chance.",
            )


def _edge(grid: Grid, chosen: Confirmation | None) -> Iterator[Finding]:
    """Whether more of what helps may help more."""
    if chosen is None or chosen.candidates < 2 or chosen.against_base.difference <= 0:
        return
    # Base is alpha 0: the smallest of positive alphas has a neighbour on both sides.
    alphas = [0.0, *(arm.alpha for arm in grid.of_kind(ArmKind.VECTOR))]
    if chosen.alpha in {min(alphas), max(alphas)}:
        where = "above" if chosen.alpha == max(alphas) else "below"
        yield Finding(
            "edge_of_grid",
            f"Alpha {alpha_text(chosen.alpha)} is the {'largest' if where == 'above' else 'least'} "
            f"that was tried: a better one may lie {where} it. Sweep a wider grid.",
        )


def _no_control(grid: Grid) -> Iterator[Finding]:
    if not grid.of_kind(ArmKind.BASE_PROMPT):
        yield Finding(
            "no_prompt_arm",
            "Base was not asked for steps (no arm base+prompt): a prompt may do as much.",
        )
    if not grid.of_kind(ArmKind.RANDOM):
        yield Finding(
            "no_random_arm",
            "There is no arm with a random vector: any change of this size may do as much.",
        )
    if not grid.of_kind(ArmKind.REPEAT):
        yield Finding(
            "no_repeat_arm", "Base was asked once (no repeat): how much is noise isn't known."
        )


def _tasks(grid: Grid) -> list[Scope]:
    return [scope for scope in grid.scopes if scope.task and not scope.family]


def _with_references(grid: Grid) -> list[tuple[Arm, Arm]]:
    """Arms that aren't base, each with its reference: with the prompt or without, as it is."""
    plain, prompted = grid.of_kind(ArmKind.BASE), grid.of_kind(ArmKind.BASE_PROMPT)
    return [
        (arm, references[0])
        for arm in grid.arms
        if arm.kind not in {ArmKind.BASE, ArmKind.BASE_PROMPT, ArmKind.REPEAT}
        if (references := (prompted or plain) if arm.kind is ArmKind.VECTOR_PROMPT else plain)
    ]
