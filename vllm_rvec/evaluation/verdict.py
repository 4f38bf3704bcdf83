"""What to do, in words that nobody can misread.

Recommends an alpha only if, on problems that did not choose it, it is better than base, better
than asking for steps, and better than a random change of the same size: each with an interval that
excludes 0 and p < 0.05. All of them must hold, so none needs a correction for there being three
(an intersection-union test: R. L. Berger, Technometrics 24 (1982) 295).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from vllm_rvec.evaluation.confirming import choose
from vllm_rvec.evaluation.records import ArmKind
from vllm_rvec.evaluation.results import Finding, Scope, Verdict
from vllm_rvec.evaluation.wording import difference, p_text, points
from vllm_rvec.vector.alpha import alpha_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_rvec.evaluation.grid import Grid
    from vllm_rvec.evaluation.records import Arm
    from vllm_rvec.evaluation.results import Comparison, Confirmation

    Code = Literal[
        "use_alpha", "prompt_does_as_much", "random_does_as_much", "no_gain", "loss", "cannot_tell"
    ]

__all__ = ["verdict_of"]


def verdict_of(
    grid: Grid,
    comparisons: Sequence[Comparison],
    confirmations: Sequence[Confirmation],
    warnings: Sequence[Finding],
) -> Verdict:
    """Say what the confirmation over all tasks shows.

    Args:
        grid: The answers.
        comparisons: Read where nothing was held out.
        confirmations: Those over all tasks are read.
        warnings: What `cautions` found; they go with the verdict.
    """
    over_all = {one.kind: one for one in confirmations if one.scope == Scope()}
    found = over_all.get(ArmKind.VECTOR)
    prompted = over_all.get(ArmKind.VECTOR_PROMPT)
    chosen = choose(grid, Scope(), ArmKind.VECTOR)
    code, text = _cannot(grid, chosen, comparisons) if found is None else _decide(found)
    return Verdict(
        code=code,
        text=text,
        arm=None if chosen is None else chosen.name,
        alpha=None if chosen is None else chosen.alpha,
        with_prompt=None if prompted is None else _with_prompt(prompted),
        warnings=tuple(warnings),
    )


def _decide(found: Confirmation) -> tuple[Code, str]:
    base = found.against_base
    if base.is_loss:
        return "loss", f"Don't use it: {_the_best(found)} loses: {_seen(base)}."
    if not base.is_gain:
        return "no_gain", f"No gain that the data shows. {_no_gain(found)}"
    alpha = alpha_text(found.alpha)
    equals = _equals(found)
    if equals:
        said = " And ".join(text for _, text in equals)
        return equals[0][0], f"Alpha {alpha} gains {_seen(base)}, but {said}"
    beaten = [
        f"{difference(one)} against {one.reference}"
        for one in (found.against_prompt, found.against_random)
        if one is not None
    ]
    return "use_alpha", f"Use alpha {alpha}: {'; '.join([_seen(base), *beaten])}."


def _equals(found: Confirmation) -> list[tuple[Code, str]]:
    """The controls that aren't beaten."""
    controls: tuple[tuple[Code, Comparison | None, str], ...] = (
        ("prompt_does_as_much", found.against_prompt, "Asking for steps in the prompt"),
        ("random_does_as_much", found.against_random, "A random change of this size"),
    )
    return [
        (code, f"it {_no_better(one)}. {what} does as much, as far as the data shows.")
        for code, one, what in controls
        if one is not None and not one.is_gain
    ]


def _no_better(comparison: Comparison) -> str:
    verb = "is worse" if comparison.is_loss else "isn't shown to be better"
    return (
        f"{verb} than {comparison.reference}: {difference(comparison)} "
        f"({p_text(comparison.p_value)})"
    )


def _seen(comparison: Comparison) -> str:
    return (
        f"{difference(comparison)} against {comparison.reference} on {comparison.n:,} held-out "
        f"problems ({p_text(comparison.p_value)})"
    )


def _the_best(found: Confirmation) -> str:
    alpha = f"alpha {alpha_text(found.alpha)}"
    if found.candidates == 1:
        return alpha
    return f"{alpha}, the best of {found.candidates} on the half that chose,"


def _no_gain(found: Confirmation) -> str:
    base = found.against_base
    best = _the_best(found)
    said = [f"{best[0].upper()}{best[1:]} makes {_seen(base)}."]
    if found.power.detectable is None:
        said.append("With so few problems not even the largest gain would be found.")
    else:
        said.append(
            f"A true gain of {found.power.detectable * 100:.1f} points would have been found four "
            "times out of five; a smaller one may have been missed."
        )
    if found.power.needed is not None and base.difference > 0:
        said.append(
            f"To show a gain of {points(base.difference)} points takes about "
            f"{_rounded(found.power.needed):,} held-out problems."
        )
    return " ".join(said)


def _rounded(number: int) -> int:
    """Two digits: more would be false."""
    return round(number, 2 - len(str(number)))


def _with_prompt(found: Confirmation) -> Finding:
    base = found.against_base
    arm = f"With the prompt, alpha {alpha_text(found.alpha)}"
    if base.is_gain:
        text = f"{arm} gains: {_seen(base)}."
        return Finding("prompted_gain", text)
    if base.is_loss:
        return Finding("prompted_loss", f"{arm} loses: {_seen(base)}.")
    return Finding(
        "prompted_no_gain",
        f"{arm} makes no gain that the data shows: {_seen(base)}.",
    )


def _cannot(grid: Grid, chosen: Arm | None, comparisons: Sequence[Comparison]) -> tuple[Code, str]:
    if not grid.of_kind(ArmKind.BASE):
        why = "there is no arm of base to compare with"
    elif not any(arm.alpha for arm in grid.of_kind(ArmKind.VECTOR)):
        why = "there is no arm of the vector"
    elif not grid.answered.any():
        why = "there are no answers"
    elif chosen is None:
        why = "no alpha was chosen: there are no answers in the half of the problems that does"
    elif not (best := _on_all_problems(grid, chosen, comparisons)).n:
        why = f"{best.arm} and {best.reference} answered no problem both"
    else:
        tried = sum(arm.alpha != 0 for arm in grid.of_kind(ArmKind.VECTOR))
        why = (
            f"no problems were held out to confirm an alpha. The best of {tried} is "
            f"{alpha_text(chosen.alpha)}, {difference(best)} against {best.reference} on all "
            f"{best.n:,} problems ({p_text(best.p_value)}, adjusted for the number of alphas "
            f"{p_text(best.adjusted_p or best.p_value)}): more than is true, for luck helped to "
            "choose it"
        )
    return "cannot_tell", f"Can't tell: {why}."


def _on_all_problems(grid: Grid, arm: Arm, comparisons: Sequence[Comparison]) -> Comparison:
    wanted = Scope(), arm.name, grid.of_kind(ArmKind.BASE)[0].name
    return next(one for one in comparisons if (one.scope, one.arm, one.reference) == wanted)
