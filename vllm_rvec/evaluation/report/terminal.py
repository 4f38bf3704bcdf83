"""A sweep's results in a terminal: the verdict, the cautions, one table for each task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from vllm_rvec.errors import printable
from vllm_rvec.evaluation.records import ArmKind
from vllm_rvec.evaluation.report.tables import shown_scopes
from vllm_rvec.evaluation.wording import between, p_number, points, share

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_rvec.evaluation.records import Arm
    from vllm_rvec.evaluation.results import Comparison, Scope, SweepResults

__all__ = ["print_table"]

COLUMNS = ("right", "95 %", "against base", "p", "tokens", "cut\noff", "no\nanswer")

NOTE = (
    "right: share of answers; tokens: mean of an answer; "
    "p: of the vector's arms, adjusted for the number of alphas (Holm)."
)

MAX_NAME = 40
"""Characters of a name that are shown."""


def print_table(results: SweepResults, console: Console) -> None:
    """Print the recommendation, the warnings and the tables of arms."""
    for scope in shown_scopes(results):
        console.print(_table(results, scope))
    console.print(Text(f"{NOTE}\n", style="dim"))
    verdict = results.verdict
    console.print(Text(printable(verdict.text), style="bold"))
    if verdict.with_prompt is not None:
        console.print(Text(printable(verdict.with_prompt.text)))
    for one in verdict.warnings:
        console.print(Padding(Text(f"- {printable(one.text)}", style="yellow"), (0, 0, 0, 2)))


def _table(results: SweepResults, scope: Scope) -> RichTable:
    title = Text(printable(scope.label)[:MAX_NAME])
    # Eighty columns are enough for names such as `v@0.75+prompt`.
    table = RichTable(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.padding = (0, 1, 0, 0)
    table.add_column("arm", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for arm in results.arms:
        table.add_row(*(Text(cell) for cell in _row(results, scope, arm)))
    return table


def _row(results: SweepResults, scope: Scope, arm: Arm) -> tuple[str, ...]:
    one = results.summary(scope, arm.name)
    accuracy = one.accuracy
    interval = None if accuracy is None else accuracy.interval
    bases = results.of_kind(ArmKind.BASE)
    against = results.comparison(scope, arm.name, bases[0].name) if bases else None
    return (
        printable(arm.name)[:MAX_NAME],
        share(None if accuracy is None else accuracy.value),
        f"{interval.low * 100:.0f}-{interval.high * 100:.0f}" if interval is not None else "-",
        f"{points(against.difference)} {between(against.interval)}" if against is not None else "",
        p_number(_adjusted(against)) if against is not None else "",
        f"{one.mean_tokens:,.0f}" if one.mean_tokens is not None else "-",
        share(one.cut_offs),
        share(one.format_failures),
    )


def _adjusted(comparison: Comparison) -> float:
    return comparison.p_value if comparison.adjusted_p is None else comparison.adjusted_p
