"""What a new engine pays once: the first load of a fresh process beside its second.

Run by `make bench`; alone: `python -m benchmarks.first_load`. Compiled loops are made anew (with
an empty cache of numba's) or read from where an earlier process left them. The first load also
touches the model's memory for the first time, as plain's does.
"""

from __future__ import annotations

import statistics
import tempfile
from typing import TYPE_CHECKING

from benchmarks.frame import Row, ratios, run
from benchmarks.loading import Way, started
from benchmarks.page_cache import files_of, read_back

if TYPE_CHECKING:
    from benchmarks.files import Files

__all__ = ["measure"]

REPEATS = 2
KINDS = ("dense", "sparse", "int8")


def measure(files: Files, repeats: int | None = None) -> list[Row]:
    """Compare first loads with plain's first load."""
    read_back(files_of(files.target, *map(files.vector, KINDS)))
    seconds: dict[str, list[float]] = {}
    for _ in range(repeats or REPEATS):
        with tempfile.TemporaryDirectory(prefix="rvec-jit-") as cache:
            _round(files, cache, seconds)
    plain = seconds.pop("plain")
    return [
        Row(
            f"first load of a process, {name} / plain",
            **ratios(values, plain),
            note=f"{statistics.median(values):.2f} / {statistics.median(plain):.2f} s",
        )
        for name, values in seconds.items()
    ]


def _round(files: Files, cache: str, seconds: dict[str, list[float]]) -> None:
    ways = {"plain": Way()}
    for kind in KINDS:
        # Of the same cache: the first compiles, the second finds it.
        for state in ("compiling", "compiled before"):
            ways[f"{kind}, {state}"] = Way.fused(files.vector(kind), 0.3)
    for name, way in ways.items():
        with started(
            files, way, env={"NUMBA_CACHE_DIR": f"{cache}/{name.partition(',')[0]}"}
        ) as loader:
            seconds.setdefault(name, []).append(loader.load().seconds)


if __name__ == "__main__":
    run(measure, __doc__)
