"""Each arm by itself, and arms with each other on the same problems.

Takes a grid and gives the numbers of a report; what they mean is for `confirming` and `verdict`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vllm_rvec.evaluation.records import ArmKind
from vllm_rvec.evaluation.results import ArmSummary, Comparison, Flip, Noise, Scope
from vllm_rvec.evaluation.statistics import holm, mcnemar_p, paired_interval, ratio_of_lengths
from vllm_rvec.intervals import Estimate, quantile, wilson

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm_rvec.evaluation.grid import Flags, Grid
    from vllm_rvec.evaluation.records import Arm, Half, Problem

__all__ = [
    "compare",
    "compare_all",
    "flips_of",
    "nearest_random",
    "noise_of",
    "summarise",
]

TRIED = (ArmKind.VECTOR, ArmKind.VECTOR_PROMPT)
"""Kinds of which there is one arm for each alpha: these are corrected for how many there are."""

MAX_FLIPS = 5
"""Of an arm, gained; and as many lost."""

MAX_TEXT = 1200
"""Characters of a text in the sample of flips; what is longer loses its middle."""


def summarise(grid: Grid, scope: Scope, arm: str) -> ArmSummary:
    """One arm in one scope."""
    row, columns = grid.index(arm), grid.columns(scope)
    given = grid.answered[row] & columns
    n = _count(given)
    correct = _count(grid.correct[row] & columns)
    lengths: list[float] = sorted(grid.tokens[row][given].tolist())
    return ArmSummary(
        scope=scope,
        arm=arm,
        answers=n,
        missing=_count(columns) - n,
        correct=correct,
        accuracy=Estimate(correct / n, wilson(correct, n)) if n else None,
        format_failures=_count(grid.format_failures[row] & columns) / n if n else None,
        cut_offs=_count(grid.cut_offs[row] & columns) / n if n else None,
        mean_tokens=sum(lengths) / n if n else None,
        median_tokens=quantile(lengths, 0.5),
        p95_tokens=quantile(lengths, 0.95),
        prompt_tokens=int(grid.prompt_tokens[row][given].sum()),
        completion_tokens=int(grid.tokens[row][given].sum()),
    )


def compare(
    grid: Grid, scope: Scope, arm: str, reference: str, half: Half | None = None
) -> Comparison:
    """One arm with another, on the problems of a scope that both answered."""
    one, other, both = _rows(grid, arm, reference, grid.columns(scope, half))
    right, others_right = grid.correct[one] & both, grid.correct[other] & both
    n, gained, lost = _count(both), _count(right & ~others_right), _count(others_right & ~right)
    lengths = grid.tokens[one][both], grid.tokens[other][both]
    return Comparison(
        scope=scope,
        half=half,
        arm=arm,
        reference=reference,
        n=n,
        both=_count(right & others_right),
        gained=gained,
        lost=lost,
        difference=(gained - lost) / n if n else 0.0,
        interval=paired_interval(gained, lost, n),
        p_value=mcnemar_p(gained, lost),
        adjusted_p=None,
        length_ratio=ratio_of_lengths(*lengths) if n else None,
    )


def compare_all(grid: Grid) -> tuple[Comparison, ...]:
    """Every comparison that a report shows, on all problems of every scope."""
    return tuple(
        comparison
        for scope in grid.scopes
        for pairs in _pairs(grid).values()
        for comparison in _adjusted([compare(grid, scope, *pair) for pair in pairs], pairs, grid)
    )


def _pairs(grid: Grid) -> dict[str, list[tuple[str, str]]]:
    """Who is compared with whom, sorted into groups that are corrected together."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for base in grid.of_kind(ArmKind.BASE)[:1]:
        for arm in grid.arms:
            if arm.name != base.name:
                groups.setdefault(f"{arm.kind} base", []).append((arm.name, base.name))
    for prompted in grid.of_kind(ArmKind.BASE_PROMPT)[:1]:
        for arm in grid.of_kind(ArmKind.VECTOR_PROMPT):
            groups.setdefault("prompted", []).append((arm.name, prompted.name))
    for arm in grid.of_kind(ArmKind.VECTOR):
        if (control := nearest_random(grid, arm)) is not None:
            groups.setdefault("random", []).append((arm.name, control.name))
    return groups


def _adjusted(
    comparisons: list[Comparison], pairs: Sequence[tuple[str, str]], grid: Grid
) -> Iterator[Comparison]:
    if not pairs or grid.arms[grid.index(pairs[0][0])].kind not in TRIED:
        return iter(comparisons)
    adjusted = holm([one.p_value for one in comparisons])
    return (replace(one, adjusted_p=p) for one, p in zip(comparisons, adjusted, strict=True))


def nearest_random(grid: Grid, arm: Arm) -> Arm | None:
    """The random arm whose alpha is nearest in size; of several, the one that is right most often.

    A random vector has v's norm, so the size of a change is that of its alpha.
    """
    everything = grid.columns(Scope())
    return min(
        grid.of_kind(ArmKind.RANDOM),
        key=lambda one: (
            abs(abs(one.alpha) - abs(arm.alpha)),
            -(grid.accuracy(one.name, everything) or 0.0),
        ),
        default=None,
    )


def noise_of(grid: Grid) -> tuple[Noise, ...]:
    """What differs between base and itself."""
    return tuple(
        _noise(grid, repeat.name, base.name)
        for base in grid.of_kind(ArmKind.BASE)[:1]
        for repeat in grid.of_kind(ArmKind.REPEAT)
    )


def _noise(grid: Grid, repeat: str, base: str) -> Noise:
    one, other, both = _rows(grid, repeat, base, grid.columns(Scope()))
    columns = np.flatnonzero(both).tolist()
    texts = sum(
        grid.answers[one, column].text != grid.answers[other, column].text for column in columns
    )
    n, grades = len(columns), _count((grid.correct[one] ^ grid.correct[other]) & both)
    return Noise(
        arm=repeat,
        n=n,
        texts=texts,
        grades=grades,
        rate=Estimate(grades / n, wilson(grades, n)) if n else None,
    )


def flips_of(grid: Grid) -> tuple[Flip, ...]:
    """A sample of the problems on which arms of the vector are graded otherwise than base.

    Spread evenly over all that there are, so that each task has its part; the same each time.
    """
    return tuple(
        _flip(grid, arm.name, base.name, column, is_gain=is_gain)
        for base in grid.of_kind(ArmKind.BASE)[:1]
        for arm in grid.of_kind(*TRIED)
        for is_gain in (True, False)
        for column in _sample(grid, arm.name, base.name, is_gain=is_gain)
    )


def _sample(grid: Grid, arm: str, base: str, *, is_gain: bool) -> list[int]:
    one, other, both = _rows(grid, arm, base, grid.columns(Scope()))
    right, wrong = (one, other) if is_gain else (other, one)
    found = np.flatnonzero(grid.correct[right] & ~grid.correct[wrong] & both)
    shown = min(MAX_FLIPS, found.size)
    places: list[int] = found[[index * found.size // shown for index in range(shown)]].tolist()
    return places


def _flip(grid: Grid, arm: str, base: str, column: int, *, is_gain: bool) -> Flip:
    task, problem = grid.problems[column]
    return Flip(
        arm=arm,
        task=task.name,
        problem=problem.id,
        is_gain=is_gain,
        question=_cut(_question(problem)),
        expected=_cut(problem.answer if isinstance(problem.answer, str) else str(problem.answer)),
        base=_cut(grid.answers[grid.index(base), column].text),
        answer=_cut(grid.answers[grid.index(arm), column].text),
    )


def _question(problem: Problem) -> str:
    if problem.prompt is not None:
        return problem.prompt
    return problem.messages[-1].content if problem.messages else ""


def _cut(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    # The end says more than the middle: that is where the answer stands.
    head, tail = MAX_TEXT // 3, MAX_TEXT - MAX_TEXT // 3
    return f"{text[:head]}\n[... {len(text) - MAX_TEXT:,} characters ...]\n{text[-tail:]}"


def _rows(grid: Grid, arm: str, reference: str, columns: Flags) -> tuple[int, int, Flags]:
    one, other = grid.index(arm), grid.index(reference)
    return one, other, grid.answered[one] & grid.answered[other] & columns


def _count(flags: Flags) -> int:
    return int(np.count_nonzero(flags))
