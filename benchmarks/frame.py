"""What every benchmark shares: a row with its goal, the verdict, the table, the command line.

A row is a ratio of two measurements of one run. The machine may be shared and busy, so

- the two are measured in turn, round by round, and divided within a round: neighbours in a round
  see the same machine;
- the median of the rounds is the figure; their quartiles are its spread;
- beside it stands the ratio of the fastest rounds, each measurement's own: noise makes a load slow,
  never fast, so these are what the machine gives when it is left alone. (The smallest of the ratios
  would not do: a round that is slow for the denominator alone makes it as small as one likes.)
- a row is a *regression* only where both, the median and the ratio of the fastest, miss the goal by
  more than 15 %: code that is too slow has neither, while a busy minute spoils the median and a
  single lucky load spoils the ratio of the fastest. A median that misses by less, or alone, is a
  *miss*: it is shown, and does not fail. The price: on a machine that is busy throughout, a
  regression may pass as a miss.

Nothing here knows what is measured, nor imports torch: a child process counts its parent's memory
until it starts its program.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, TypedDict

from rich.console import Console
from rich.table import Table

from benchmarks.files import Files, add_shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = ["Ratios", "Row", "Verdict", "parser", "ratios", "report", "run"]

TOLERANCE = 1.15
"""How far beyond its goal a ratio may be before the run fails."""


class Verdict(StrEnum):
    """What a row says."""

    MET = "met"
    MISS = "miss"
    REGRESSION = "regression"
    INFORMATION = ""
    """No goal."""


@dataclass(frozen=True, slots=True)
class Row:
    """One question and its answer."""

    name: str
    rounds: tuple[float, ...]
    """A ratio for each round."""
    goal: float | None = None
    """What the median shall reach; None for a row that only informs."""
    fastest: float | None = None
    """The ratio of the fastest rounds; None where no time is measured, and the best counts."""
    limit: str = ""
    """What nothing can beat, and why."""
    at_least: bool = False
    """Whether more is better; else less is."""
    note: str = ""
    """The measurements behind the ratio."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """The same for machines, units in their names."""

    @property
    def median(self) -> float:
        """The figure."""
        return statistics.median(self.rounds)

    @property
    def best(self) -> float:
        """What the machine gives when it is left alone."""
        if self.fastest is not None:
            return self.fastest
        return max(self.rounds) if self.at_least else min(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Half of the rounds lie between them."""
        if len(self.rounds) < 2:
            return self.rounds[0], self.rounds[0]
        low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return low, high

    @property
    def verdict(self) -> Verdict:
        """Compare with the goal, as the module says."""
        if self.goal is None:
            return Verdict.INFORMATION
        if self._misses_by(self.median) <= 1:
            return Verdict.MET
        best, median = self._misses_by(self.best), self._misses_by(self.median)
        return Verdict.REGRESSION if min(best, median) > TOLERANCE else Verdict.MISS

    def _misses_by(self, ratio: float) -> float:
        """Return 1 at the goal, more beyond it on the wrong side; judged as it is printed."""
        assert self.goal is not None
        ratio = round(ratio, 2)
        if not self.at_least:
            return ratio / self.goal
        return self.goal / ratio if ratio > 0 else float("inf")


class Ratios(TypedDict):
    """Two fields of a row."""

    rounds: tuple[float, ...]
    fastest: float


def ratios(own: Sequence[float], other: Sequence[float]) -> Ratios:
    """Divide two measurements in seconds: round by round, and the fastest by the fastest.

    >>> ratios([3.0, 8.0], [2.0, 4.0])
    {'rounds': (1.5, 2.0), 'fastest': 1.5}
    """
    rounds = tuple(a / b for a, b in zip(own, other, strict=True))
    return {"rounds": rounds, "fastest": min(own) / min(other)}


def parser(description: str | None) -> argparse.ArgumentParser:
    """Make the command line that every benchmark has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_shape(made)
    made.add_argument("--repeats", type=int, help="rounds; the median counts")
    made.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return made


def run(measure: Callable[[Files, int | None], Iterable[Row]], description: str | None) -> None:
    """Be the whole of one benchmark's command: files, rows, table, exit status."""
    options = parser(description).parse_args()
    with Files.asked_for(options) as files:
        rows = list(measure(files, options.repeats))
    sys.exit(report(rows, as_json=options.json, title=files.title))


def report(rows: Sequence[Row], *, as_json: bool, title: str) -> int:
    """Print the rows; return the exit status: 1 where one is a regression."""
    if as_json:
        json.dump(
            {"machine": machine(), "title": title, "rows": list(map(facts, rows))}, sys.stdout
        )
        print()
    else:
        console = Console(width=None if sys.stdout.isatty() else 140)
        console.print(_table(rows, title))
    return int(any(row.verdict is Verdict.REGRESSION for row in rows))


def facts(row: Row) -> Mapping[str, object]:
    """Give a row's figures for machines."""
    figures = {"median": row.median, "best": row.best, "quartiles": row.quartiles}
    return asdict(row) | figures | {"verdict": row.verdict.value}


def machine() -> str:
    """Name the processor, its cores, and the kernel."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - no path of ours
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    cores = len(os.sched_getaffinity(0))
    return f"{names[0] if names else platform.machine()}, {cores} cores, Linux {platform.release()}"


def _table(rows: Sequence[Row], title: str) -> Table:
    table = Table(title=title, caption=machine())
    for column, justify in (
        ("what", "left"),
        ("ratio", "right"),
        ("quartiles", "right"),
        ("fastest", "right"),
        ("goal", "right"),
        ("limit", "right"),
        ("verdict", "left"),
        ("measured", "left"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        goal = "" if row.goal is None else f"{'at least ' * row.at_least}{row.goal:.2f}"
        spread = "{:.2f} to {:.2f}".format(*row.quartiles)
        style = {Verdict.REGRESSION: "bold red", Verdict.MISS: "yellow"}.get(row.verdict, "")
        figures = (f"{row.median:.2f}", spread, f"{row.best:.2f}")
        cells = (row.name, *figures, goal, row.limit, row.verdict.value, row.note)
        table.add_row(*cells, style=style)
    return table
