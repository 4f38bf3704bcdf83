"""A sweep's results as Markdown: for a README, a pull request, a model card."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from vllm_rvec.errors import printable
from vllm_rvec.evaluation.report.document import as_document
from vllm_rvec.evaluation.report.methods import METHODS
from vllm_rvec.evaluation.report.tables import (
    accuracy_table,
    confirmation_table,
    cost_table,
    difference_table,
    gain_table,
    noise_table,
    shown_scopes,
    task_table,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_rvec.evaluation.report.tables import Table
    from vllm_rvec.evaluation.results import SweepResults

__all__ = ["as_markdown", "escaped"]

SPECIAL = re.compile(r"[\\`*_|~]|\](?=[\[(:])")
"""What Markdown reads as more than itself within a line; brackets only where they make a link."""


def as_markdown(results: SweepResults) -> str:
    """The whole report but for the pictures and the sample of answers."""
    return "\n\n".join(_parts(results)) + "\n"


def escaped(text: str) -> str:
    r"""Make any text mean itself in a line of Markdown.

    >>> print(escaped("[a](b) <i> x|y"))
    [a\](b) &lt;i&gt; x\|y
    """
    plain = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return SPECIAL.sub(lambda found: f"\\{found.group()}", plain)


def _parts(results: SweepResults) -> Iterator[str]:
    verdict = results.verdict
    yield "# Sweep of alphas"
    yield f"**{escaped(verdict.text)}**"
    if verdict.with_prompt is not None:
        yield escaped(verdict.with_prompt.text)
    if verdict.warnings:
        yield "## Before you believe it"
        yield "\n".join(f"- {escaped(one.text)}" for one in verdict.warnings)
    yield from _table(confirmation_table(results))
    yield from _table(gain_table(results))
    for scope in shown_scopes(results):
        yield from _table(accuracy_table(results, scope))
        yield from _table(difference_table(results, scope))
    yield from _table(noise_table(results))
    yield from _table(cost_table(results))
    yield from _table(task_table(results))
    yield "## Repeat this"
    facts = json.dumps(as_document(results)["facts"], indent=2, allow_nan=False)
    yield f"```json\n{facts}\n```"
    yield "## How it was calculated"
    yield "\n".join(f"- {escaped(method)}" for method in METHODS)


def _table(table: Table | None) -> Iterator[str]:
    if table is None or not table.rows:
        return
    yield f"## {escaped(table.title)}"
    numbers = len(table.columns) - table.texts
    lines = [_row(table.columns), _row(("---",) * table.texts + ("---:",) * numbers, is_rule=True)]
    yield "\n".join([*lines, *(_row(row) for row in table.rows)])


def _row(cells: tuple[str, ...], *, is_rule: bool = False) -> str:
    return f"| {' | '.join(cells if is_rule else map(escaped, cells))} |"
