"""The pictures of a report: accuracy, length, failures and flips against alpha, losses and gains.

Chooses what is drawn; `svg` draws it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_rvec.evaluation.records import ArmKind
from vllm_rvec.evaluation.report.svg import (
    Bar,
    Level,
    Mark,
    Series,
    bar_chart,
    interval_chart,
    line_chart,
)
from vllm_rvec.evaluation.wording import difference, share
from vllm_rvec.vector.alpha import alpha_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_rvec.evaluation.records import Arm
    from vllm_rvec.evaluation.results import ArmSummary, Scope, SweepResults

    Marked = Callable[[Arm, ArmSummary], Mark | None]

__all__ = [
    "accuracy_picture",
    "failure_picture",
    "flip_picture",
    "gain_picture",
    "length_picture",
]

ALPHA = "alpha (0: base)"

SERIES = (
    ("vector", "vector", (ArmKind.BASE, ArmKind.VECTOR), True),
    ("vector + prompt", "prompted", (ArmKind.BASE_PROMPT, ArmKind.VECTOR_PROMPT), True),
    ("random", "random", (ArmKind.RANDOM,), False),
    ("-v", "minus", (ArmKind.MINUS,), False),
)
"""Name, style, kinds, whether a line joins them. Base is the vector at alpha 0."""


def accuracy_picture(results: SweepResults, scope: Scope, key: str) -> str | None:
    """Accuracy with its interval against alpha; base + prompt drawn across."""
    prompts = [results.summary(scope, arm.name) for arm in results.of_kind(ArmKind.BASE_PROMPT)]
    levels = [
        Level(
            "base + prompt",
            "prompted",
            one.accuracy.value,
            one.accuracy.interval.low,
            one.accuracy.interval.high,
        )
        for one in prompts
        if one.accuracy is not None and one.accuracy.interval is not None
    ]
    series = _series(results, scope, _accuracy)
    if not series:
        return None
    title = f"{scope.label}: accuracy against alpha, with 95 % intervals"
    return line_chart(key, title, series, levels, x_label=ALPHA, is_share=True, is_from_zero=False)


def length_picture(results: SweepResults, scope: Scope, key: str) -> str | None:
    """Mean tokens of an answer against alpha."""
    series = _series(results, scope, _length)
    if not series:
        return None
    title = f"{scope.label}: mean tokens of an answer against alpha"
    return line_chart(key, title, series, x_label=ALPHA, is_share=False, is_from_zero=True)


def failure_picture(results: SweepResults, scope: Scope, key: str) -> str | None:
    """Answers without anything to grade, and answers cut off, against alpha: of the vector."""
    series = [
        Series(name, style, marks)
        for name, style, of in (
            ("no answer found", "vector", lambda one: one.format_failures),
            ("cut off", "prompted", lambda one: one.cut_offs),
        )
        if (marks := _failures(results, scope, name, of))
    ]
    if not series:
        return None
    title = f"{scope.label}: answers of the vector's arms that fail, against alpha"
    return line_chart(key, title, series, x_label=ALPHA, is_share=True, is_from_zero=True)


def flip_picture(results: SweepResults, scope: Scope, key: str) -> str | None:
    """On how many problems an arm and base differ, to each side."""
    rows = [
        Bar(one.arm, one.lost, one.gained)
        for arm in results.arms
        for base in results.of_kind(ArmKind.BASE)[:1]
        if (one := results.comparison(scope, arm.name, base.name)) is not None
    ]
    if not rows:
        return None
    title = f"{scope.label}: problems that only base gets right, and that only the arm gets right"
    return bar_chart(key, title, rows, ("only base right: lost", "only the arm right: gained"))


def gain_picture(results: SweepResults, key: str) -> str | None:
    """The chosen arm against base in each task and family."""
    bases = results.of_kind(ArmKind.BASE)
    name = results.verdict.arm
    if name is None or not bases:
        return None
    rows = [
        (
            one.scope.label,
            Mark(
                x=one.difference,
                y=0.0,
                low=one.interval.low,
                high=one.interval.high,
                title=f"{one.scope.label}: {difference(one)}",
            ),
        )
        for one in results.comparisons
        if one.scope.task and (one.arm, one.reference) == (name, bases[0].name)
        if one.interval is not None
    ]
    if len(rows) < 2:
        return None
    title = f"{name} against {bases[0].name} on all problems, with 95 % intervals"
    return interval_chart(key, title, rows, "difference in points")


def _series(results: SweepResults, scope: Scope, marked: Marked) -> list[Series]:
    found = []
    for name, style, kinds, is_line in SERIES:
        marks = tuple(
            mark
            for arm in results.of_kind(*kinds)
            if (mark := marked(arm, results.summary(scope, arm.name))) is not None
        )
        if marks:
            found.append(Series(name, style, marks, is_line=is_line))
    return found


def _accuracy(arm: Arm, one: ArmSummary) -> Mark | None:
    if one.accuracy is None or one.accuracy.interval is None:
        return None
    interval = one.accuracy.interval
    said = f"{arm.name}: {share(one.accuracy.value)}"
    title = f"{said} ({share(interval.low)} to {share(interval.high)})"
    return Mark(arm.alpha, one.accuracy.value, interval.low, interval.high, title)


def _length(arm: Arm, one: ArmSummary) -> Mark | None:
    if one.mean_tokens is None:
        return None
    return Mark(arm.alpha, one.mean_tokens, title=f"{arm.name}: {one.mean_tokens:,.0f} tokens")


def _failures(
    results: SweepResults, scope: Scope, name: str, of: Callable[[ArmSummary], float | None]
) -> tuple[Mark, ...]:
    return tuple(
        Mark(arm.alpha, value, title=f"alpha {alpha_text(arm.alpha)}: {share(value)} {name}")
        for arm in results.of_kind(ArmKind.BASE, ArmKind.VECTOR)
        if (value := of(results.summary(scope, arm.name))) is not None
    )
