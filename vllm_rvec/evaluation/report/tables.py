"""The tables of a report, as plain texts: what Markdown, HTML and the terminal have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_rvec.evaluation.results import Scope
from vllm_rvec.evaluation.statistics import holm
from vllm_rvec.evaluation.wording import p_number, points, share
from vllm_rvec.vector.alpha import alpha_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_rvec.evaluation.results import Comparison, Confirmation, SweepResults
    from vllm_rvec.intervals import Estimate, Interval

__all__ = [
    "Table",
    "accuracy_table",
    "confirmation_table",
    "cost_table",
    "difference_table",
    "gain_table",
    "noise_table",
    "shown_scopes",
    "task_table",
]

NONE = "-"


@dataclass(frozen=True, slots=True)
class Table:
    """Texts in columns. They may be anybody's: who shows them escapes them."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int = 1
    """How many of the first columns are text, to the left; the others are numbers."""


def shown_scopes(results: SweepResults) -> tuple[Scope, ...]:
    """Tasks; and all of them together, where that is something else."""
    scopes = tuple(scope for scope in results.scopes() if not scope.family)
    return scopes[1:] if len(results.tasks) == 1 else scopes


def accuracy_table(results: SweepResults, scope: Scope) -> Table:
    """How each arm did."""
    return Table(
        title=f"{scope.label}: arms",
        columns=(
            "arm",
            "accuracy",
            "95 % interval",
            "no answer found",
            "cut off",
            "tokens, mean",
            "median",
            "95th percentile",
            "answers",
        ),
        rows=tuple(
            (
                arm.name,
                share(None if one.accuracy is None else one.accuracy.value),
                _shares(one.accuracy),
                share(one.format_failures),
                share(one.cut_offs),
                _number(one.mean_tokens),
                _number(one.median_tokens),
                _number(one.p95_tokens),
                f"{one.answers:,}" + (f" (of {one.answers + one.missing:,})" * bool(one.missing)),
            )
            for arm in results.arms
            for one in [results.summary(scope, arm.name)]
        ),
    )


def difference_table(results: SweepResults, scope: Scope) -> Table:
    """Each arm against base, and like with like, on all problems."""
    return Table(
        title=f"{scope.label}: differences on all problems, in points",
        columns=(
            "arm",
            "against",
            "difference",
            "95 % interval",
            "gained",
            "lost",
            "p",
            "p, Holm",
            "times as long",
            "problems",
        ),
        rows=tuple(
            (
                one.arm,
                one.reference,
                points(one.difference),
                _range(one.interval),
                f"{one.gained:,}",
                f"{one.lost:,}",
                p_number(one.p_value),
                p_number(one.adjusted_p),
                NONE if one.length_ratio is None else f"{one.length_ratio.value:.2f}",
                f"{one.n:,}",
            )
            for one in results.comparisons
            if one.scope == scope
        ),
        texts=2,
    )


def gain_table(results: SweepResults) -> Table | None:
    """The chosen arm against base, for each task and family: losses beside gains.

    Returns:
        None where no arm was chosen, or there is but one task without families.
    """
    name = results.verdict.arm
    shown = [one for one in results.comparisons if one.arm == name and one.scope.task]
    base = next((one.reference for one in shown), None)
    rows = [one for one in shown if one.reference == base]
    if name is None or base is None or len(rows) < 2:
        return None
    families = [one for one in rows if one.scope.family]
    adjusted = dict(zip(families, holm([one.p_value for one in families]), strict=True))
    return Table(
        title=f"{name} against {base}, for each task and family, on all problems, in points",
        columns=(
            "problems of",
            base,
            name,
            "difference",
            "95 % interval",
            "p",
            "p, Holm",
            "problems",
        ),
        rows=tuple(
            (
                one.scope.label,
                share((one.both + one.lost) / one.n if one.n else None),
                share((one.both + one.gained) / one.n if one.n else None),
                points(one.difference),
                _range(one.interval),
                p_number(one.p_value),
                p_number(adjusted.get(one)),
                f"{one.n:,}",
            )
            for one in rows
        ),
    )


def confirmation_table(results: SweepResults) -> Table:
    """What the half that wasn't looked at says of the alpha that the other half chose."""
    return Table(
        title="Held-out confirmation, in points",
        columns=(
            "problems of",
            "chosen",
            "against",
            "of",
            "accuracy when chosen",
            "difference, held out",
            "95 % interval",
            "p",
            "p, Holm",
            "problems",
        ),
        rows=tuple(row for one in results.confirmations for row in _confirmation_rows(one)),
        texts=3,
    )


def noise_table(results: SweepResults) -> Table | None:
    """Base against itself."""
    if not results.noise:
        return None
    return Table(
        title="Base asked again: noise",
        columns=("arm", "texts that differ", "grades that differ", "rate", "95 %", "problems"),
        rows=tuple(
            (
                one.arm,
                f"{one.texts:,}",
                f"{one.grades:,}",
                share(None if one.rate is None else one.rate.value),
                _shares(one.rate),
                f"{one.n:,}",
            )
            for one in results.noise
        ),
    )


def cost_table(results: SweepResults) -> Table:
    """What each arm cost, in tokens."""
    costs = [results.summary(Scope(), arm.name) for arm in results.arms]
    total = sum(one.prompt_tokens for one in costs), sum(one.completion_tokens for one in costs)
    rows = [
        (one.arm, f"{one.answers:,}", f"{one.prompt_tokens:,}", f"{one.completion_tokens:,}")
        for one in costs
    ]
    answers = sum(one.answers for one in costs)
    return Table(
        title="Cost",
        columns=("arm", "answers", "prompt tokens", "completion tokens"),
        rows=(*rows, ("all", f"{answers:,}", f"{total[0]:,}", f"{total[1]:,}")),
    )


def task_table(results: SweepResults) -> Table:
    """What was asked."""
    return Table(
        title="Tasks",
        columns=(
            "task",
            "source",
            "digest",
            "scorer",
            "problems",
            "choose",
            "confirm",
            "max_tokens",
        ),
        rows=tuple(
            (
                one.name,
                one.source or NONE,
                one.digest[:16] or NONE,
                one.scorer,
                f"{one.problems:,}",
                f"{one.choose:,}",
                f"{one.confirm:,}",
                f"{one.max_tokens:,}",
            )
            for one in results.tasks
        ),
        texts=4,
    )


def _confirmation_rows(one: Confirmation) -> Iterator[tuple[str, ...]]:
    pairs: list[tuple[Comparison | None, float | None]] = [
        (one.against_base, one.adjusted_p),
        (one.against_prompt, None),
        (one.against_random, None),
    ]
    for comparison, adjusted in pairs:
        if comparison is not None:
            yield (
                one.scope.label,
                f"{one.arm} (alpha {alpha_text(one.alpha)})",
                comparison.reference,
                f"{one.candidates:,}",
                share(one.chosen_accuracy),
                points(comparison.difference),
                _range(comparison.interval),
                p_number(comparison.p_value),
                p_number(adjusted),
                f"{comparison.n:,}",
            )


def _shares(estimate: Estimate | None) -> str:
    if estimate is None or estimate.interval is None:
        return NONE
    return f"{estimate.interval.low * 100:.1f} to {estimate.interval.high * 100:.1f}"


def _range(interval: Interval | None) -> str:
    return NONE if interval is None else f"{points(interval.low)} to {points(interval.high)}"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"
