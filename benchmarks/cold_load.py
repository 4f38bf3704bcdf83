"""Loads whose files are not in memory: how much longer a fused one takes, what N variants read.

Run by `make bench`; alone: `python -m benchmarks.cold_load`. Each load is a fresh process that has
imported everything and waits while its files' pages are dropped (`page_cache`). A disk sets the
pace, so a fused load may take as much longer as it has more to read, and 5 %.

The variants of one node are loads of several processes one after the other, of which only the first
finds cold files.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from typing import TYPE_CHECKING

from benchmarks.frame import Row, ratios, run
from benchmarks.loading import Way, started
from benchmarks.page_cache import drop, files_of

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.files import Files
    from benchmarks.loading import Load, Loader

__all__ = ["measure"]

REPEATS = 5
VARIANTS = 3
ALLOWANCE = 1.05


def measure(files: Files, repeats: int | None = None) -> list[Row]:
    """Compare cold loads, then count what variants read."""
    return [_cold(files, repeats or REPEATS), _variants(files)]


def _cold(files: Files, repeats: int) -> Row:
    plain, dense = Way(), Way.fused(files.vector("dense"))
    with ExitStack() as stack:
        loaders = [
            stack.enter_context(started(files, w, loads=repeats + 1)) for w in (plain, dense)
        ]
        for loader in loaders:
            loader.load()  # compiled loops, the model's own memory
        rounds = [[_load_cold(files, loader) for loader in loaders] for _ in range(repeats)]
    plains, denses = zip(*rounds, strict=True)
    read = [sum(load.read_bytes for load in loads) for loads in (denses, plains)]
    seconds = [[load.seconds for load in loads] for loads in (denses, plains)]
    bytes_ratio = read[0] / read[1]
    medians = [statistics.median(values) for values in seconds]
    return Row(
        "cold load, dense bf16, alpha 1 / plain",
        **ratios(*seconds),
        goal=round(bytes_ratio * ALLOWANCE, 2),
        limit=f"{bytes_ratio:.2f}",
        note="{:.2f} / {:.2f} s; {:.2f} / {:.2f} GB read".format(
            *medians, denses[0].read_bytes / 1e9, plains[0].read_bytes / 1e9
        ),
        figures={"disk_bytes_per_second": plains[0].read_bytes / medians[1]},
    )


def _variants(files: Files) -> Row:
    way = Way.fused(files.vector("dense"))
    drop(_all(files))
    read: list[int] = []
    for _ in range(VARIANTS):
        with started(files, way) as loader:
            read.append(loader.load().read_bytes)
    return Row(
        f"{VARIANTS} variants on one node: bytes read from disk / one's",
        (sum(read) / read[0],),
        1.0,
        limit="1",
        note=", then ".join(f"{count / 1e9:.3f}" for count in read) + " GB",
    )


def _load_cold(files: Files, loader: Loader) -> Load:
    drop(_all(files))
    return loader.load()


def _all(files: Files) -> list[Path]:
    return files_of(files.target, files.vector("dense"))


if __name__ == "__main__":
    run(measure, __doc__)
