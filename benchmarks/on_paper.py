"""What loading a 7B, a 70B and a 405B takes, on paper: bytes and seconds from measured rates.

`make bench-paper`; alone: `python -m benchmarks.on_paper --results bench.json`, of which the rates
are taken (`python -m benchmarks --json > bench.json`), or given as options. Nothing is loaded.

    weights of a rank    W = 2 bytes * parameters / TP
    vector of a rank     V = bytes per weight of its encoding * parameters / TP
    moved by a rank      M = W (read) + V (read) + W (written)
    warm seconds         W / plain rate * ratio of the encoding (measured)
    cold seconds         max(warm, (W + V) * TP / disk rate): ranks of a node share its disk and its
                         page cache, so the disk reads each byte once for all of them

Bytes per weight: dense bf16 2; sparse 3 bytes for each weight that changed (value and gap), at 10 %
changed 0.3; int8 1 (a row's scale is less than a thousandth). Parameters that are not split among
ranks (norms) are too few to count. Ranks of a node that share its memory's bandwidth reach less
than the rate that one alone was measured at: --ranks-slower says by how much.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

__all__ = ["Estimate", "Rates", "estimate", "estimates", "rates_of"]

MODELS = {"7B": (7.62e9, 1), "70B, TP 8": (70.6e9, 8), "405B, TP 8": (405.9e9, 8)}
"""Parameters and ranks: Qwen2.5-7B, Llama 3 70B, Llama 3.1 405B."""
BYTES_PER_WEIGHT = {"plain": 0.0, "dense": 2.0, "sparse": 0.3, "int8": 1.0}
ROWS = {
    "dense": "warm load, dense bf16, alpha 1 / plain",
    "sparse": "warm load, sparse, 90 % unchanged / plain",
    "int8": "warm load, int8 / plain",
}
COLD_ROW = "cold load, dense bf16, alpha 1 / plain"


@dataclass(frozen=True, slots=True)
class Rates:
    """What was measured, or is assumed."""

    plain_bytes_per_second: float
    """Of weights, by one rank's plain warm load."""
    disk_bytes_per_second: float
    """Of a node's disk."""
    ratios: dict[str, float]
    """Of a warm load with each kind of vector to a plain one."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """One model with one kind of vector."""

    model: str
    vector: str
    weights_bytes: float
    """Of one rank."""
    vector_bytes: float
    """Of one rank."""
    moved_bytes: float
    """By one rank: read and written."""
    warm_seconds: float
    cold_seconds: float


def estimate(model: str, vector: str, rates: Rates, ranks_slower: float = 1.0) -> Estimate:
    """Compute one row, as the module says.

    >>> rates = Rates(1e9, 1e9, {"dense": 1.5})
    >>> estimate("7B", "dense", rates).cold_seconds
    30.48
    """
    parameters, ranks = MODELS[model]
    weights = 2 * parameters / ranks
    stored = BYTES_PER_WEIGHT[vector] * parameters / ranks
    rate = rates.plain_bytes_per_second / (ranks_slower if ranks > 1 else 1)
    warm = weights / rate * rates.ratios.get(vector, 1.0)
    disk = (weights + stored) * ranks / rates.disk_bytes_per_second
    return Estimate(model, vector, weights, stored, 2 * weights + stored, warm, max(warm, disk))


def estimates(rates: Rates, ranks_slower: float = 1.0) -> list[Estimate]:
    """Compute all rows."""
    kinds = ["plain", *(kind for kind in ROWS if kind in rates.ratios)]
    return [estimate(model, kind, rates, ranks_slower) for model in MODELS for kind in kinds]


def rates_of(results: Path) -> Rates:
    """Take the rates from what `python -m benchmarks --json` printed.

    Raises:
        KeyError: A row that is needed was not measured.
    """
    rows = {row["name"]: row for row in json.loads(results.read_text())["rows"]}
    return Rates(
        rows[ROWS["dense"]]["figures"]["plain_bytes_per_second"],
        rows[COLD_ROW]["figures"]["disk_bytes_per_second"],
        {kind: rows[name]["median"] for kind, name in ROWS.items()},
    )


def main() -> None:
    """Take the rates, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, help="rates from `python -m benchmarks --json`")
    parser.add_argument("--plain-gb-per-second", type=float, default=6.5)
    parser.add_argument("--disk-gb-per-second", type=float, default=2.0)
    for kind, goal in (("dense", 1.5), ("sparse", 1.25), ("int8", 1.4)):
        parser.add_argument(f"--{kind}-ratio", type=float, default=goal, help="the goal by default")
    parser.add_argument("--ranks-slower", type=float, default=1.0, help="with TP; 1: not at all")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    rates = rates_of(options.results) if options.results else _given(options)
    rows = estimates(rates, options.ranks_slower)
    if options.json:
        json.dump([asdict(row) for row in rows], sys.stdout, indent=1)
    else:
        Console(width=None if sys.stdout.isatty() else 110).print(_table(rows, rates))


def _given(options: argparse.Namespace) -> Rates:
    return Rates(
        options.plain_gb_per_second * 1e9,
        options.disk_gb_per_second * 1e9,
        {kind: getattr(options, f"{kind}_ratio") for kind in ROWS},
    )


def _table(rows: list[Estimate], rates: Rates) -> Table:
    plain, disk = rates.plain_bytes_per_second / 1e9, rates.disk_bytes_per_second / 1e9
    table = Table(
        title=f"on paper: a rank loads {plain:.1f} GB/s of weights plainly, a disk gives {disk:.1f}"
    )
    table.add_column("model")
    table.add_column("vector")
    for column in ("weights GB", "vector GB", "moved GB", "warm s", "cold s"):
        table.add_column(f"{column} a rank" if "GB" in column else column, justify="right")
    for row in rows:
        sizes = (row.weights_bytes, row.vector_bytes, row.moved_bytes)
        seconds = (row.warm_seconds, row.cold_seconds)
        cells = (*(f"{size / 1e9:.1f}" for size in sizes), *(f"{s:.1f}" for s in seconds))
        table.add_row(row.model, row.vector, *cells, end_section=row.vector == "int8")
    return table


if __name__ == "__main__":
    main()
