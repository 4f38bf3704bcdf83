"""vllm_rvec.evaluation.report.terminal: what people see first."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING

from rich.console import Console

from tests.evaluation.simulation import BASE, VECTORS, task
from vllm_rvec.evaluation.analysis import analyse
from vllm_rvec.evaluation.report import print_table

if TYPE_CHECKING:
    from vllm_rvec.evaluation.results import SweepResults


def printed(results: SweepResults) -> str:
    out = StringIO()
    print_table(results, Console(file=out, width=400))
    return out.getvalue()


def test_verdict_and_cautions_stand_below_the_tables(results: SweepResults) -> None:
    """Where a terminal's reader looks: at the end, nothing cut."""
    text = printed(results)
    assert results.verdict.text in text
    for warning in results.verdict.warnings:
        assert warning.text in text
    assert text.index("v@0.25") < text.index(results.verdict.text)


def test_every_arm_has_a_row_in_every_task(results: SweepResults) -> None:
    """And in all tasks together, where there are several."""
    rows = [line.split()[0] for line in printed(results).splitlines() if line.strip()]
    for arm in results.arms:
        assert rows.count(arm.name) == 4


def test_texts_of_others_are_no_markup_and_no_escape(hostile: SweepResults) -> None:
    """Control characters are spelled out; brackets are brackets."""
    text = printed(hostile)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[x](javascript" in text


def test_nothing_known_is_printed_as_such() -> None:
    """No answers: dashes, and why."""
    text = printed(analyse([task("a", 5)], [BASE, *VECTORS], [], {}))
    assert "Can't tell: there are no answers." in text
