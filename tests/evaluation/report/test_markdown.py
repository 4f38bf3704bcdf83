"""vllm_rvec.evaluation.report.markdown: tables that mean what they say."""

from __future__ import annotations

import doctest
import re
from typing import TYPE_CHECKING

from vllm_rvec.evaluation.report import as_markdown, markdown
from vllm_rvec.evaluation.report.markdown import escaped

if TYPE_CHECKING:
    from vllm_rvec.evaluation.results import SweepResults


def test_examples_hold() -> None:
    """The doctests pass."""
    assert doctest.testmod(markdown).failed == 0


def test_the_verdict_comes_first_then_the_cautions(results: SweepResults) -> None:
    """What a reader who stops early must have seen."""
    text = as_markdown(results)
    assert text.startswith(f"# Sweep of alphas\n\n**{escaped(results.verdict.text)}**\n")
    assert text.index("## Before you believe it") < text.index("## Held-out confirmation")
    for warning in results.verdict.warnings:
        assert f"- {escaped(warning.text)}\n" in text


def test_every_table_is_whole(results: SweepResults, hostile: SweepResults) -> None:
    """Each row has as many cells as its head, whatever the names are."""
    for each in (results, hostile):
        tables = re.findall(r"(?:^\|.*\n)+", as_markdown(each), flags=re.MULTILINE)
        assert len(tables) >= 6
        for table in tables:
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_each_task_shows_losses_beside_gains(results: SweepResults) -> None:
    """The chosen arm has a row for every task and family."""
    text = as_markdown(results)
    for scope in ("a", "b", "bbh", "bbh / family 0"):
        assert re.search(rf"^\| {scope} \| \d+\.\d % \| \d+\.\d % \| [+-]?\d", text, re.MULTILINE)


def test_nothing_of_others_becomes_markup(hostile: SweepResults) -> None:
    """No tag, no link, no control character; only the block of facts has texts as JSON does."""
    text = as_markdown(hostile)
    before, facts = text.split("```json\n")
    rest = before + facts.split("\n```")[1]
    assert "<" not in rest
    assert "](" not in rest.replace("\\](", "")
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert text.encode()


def test_the_block_of_facts_can_not_be_closed_from_inside(hostile: SweepResults) -> None:
    """No line of it starts with backticks."""
    assert len(re.findall(r"^```", as_markdown(hostile), flags=re.MULTILINE)) == 2
