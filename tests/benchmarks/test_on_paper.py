"""Estimates follow from the rates by the formulae that the module states."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from benchmarks.load_time import GOALS
from benchmarks.on_paper import COLD_ROW, ROWS, Rates, estimate, estimates, rates_of

if TYPE_CHECKING:
    from pathlib import Path

RATES = Rates(10e9, 2e9, {"dense": 1.5, "sparse": 1.25, "int8": 1.4})


def test_a_rank_has_its_share_and_the_node_reads_everything() -> None:
    """70.6e9 weights of 2 bytes, 8 ranks, one disk."""
    row = estimate("70B, TP 8", "dense", RATES)
    assert row.weights_bytes == row.vector_bytes == pytest.approx(17.65e9)
    assert row.moved_bytes == pytest.approx(3 * 17.65e9)
    assert row.warm_seconds == pytest.approx(17.65 / 10 * 1.5)
    assert row.cold_seconds == pytest.approx(2 * 141.2 / 2)


def test_plain_reads_no_vector() -> None:
    """And is the ratio's 1."""
    row = estimate("7B", "plain", RATES)
    assert row.vector_bytes == 0
    assert row.warm_seconds == pytest.approx(1.524)


def test_a_disk_faster_than_the_loader_does_not_make_it_faster() -> None:
    """Cold is never less than warm."""
    fast = Rates(10e9, 1e15, RATES.ratios)
    assert all(row.cold_seconds == row.warm_seconds for row in estimates(fast))


def test_ranks_that_share_memory_take_longer() -> None:
    """A single rank shares with none."""
    assert estimate("70B, TP 8", "int8", RATES, 2.0).warm_seconds == pytest.approx(
        2 * estimate("70B, TP 8", "int8", RATES).warm_seconds
    )
    assert estimate("7B", "int8", RATES, 2.0) == estimate("7B", "int8", RATES)


def test_rates_come_from_what_was_measured(tmp_path: Path) -> None:
    """By the names of the rows that `load_time` and `cold_load` print."""
    rows = [
        {"name": name, "median": 1.1, "figures": {"plain_bytes_per_second": 5e9}}
        for name in ROWS.values()
    ]
    rows.append({"name": COLD_ROW, "median": 2, "figures": {"disk_bytes_per_second": 1e9}})
    (tmp_path / "bench.json").write_text(json.dumps({"rows": rows}))
    rates = rates_of(tmp_path / "bench.json")
    assert rates == Rates(5e9, 1e9, dict.fromkeys(ROWS, 1.1))
    assert {name.split(", ", 1)[1].removesuffix(" / plain") for name in ROWS.values()} <= set(GOALS)
