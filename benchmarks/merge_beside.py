"""Merge with mergekit and load the result plainly, beside a load that adds the vector.

Run by `make bench`; alone: `python -m benchmarks.merge_beside`. mergekit has an environment of
its own (`make mergekit`, or MERGEKIT_ENV names one): without it there is no row. Its time is that
of its work alone, without the start of Python; so is that of the loads. Files are warm.
"""

from __future__ import annotations

import statistics
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from benchmarks.extract_merge import NO_MERGEKIT, mergekit_way
from benchmarks.frame import Row, ratios, run
from benchmarks.loading import Way, started
from benchmarks.page_cache import files_of, read_back

if TYPE_CHECKING:
    from benchmarks.files import Files

__all__ = ["measure"]

REPEATS = 2
NAME = "mergekit, then plain load / load with a dense vector"


def measure(files: Files, repeats: int | None = None) -> list[Row]:
    """Compare the two ways from donors and target to a filled model."""
    merge = mergekit_way(*files.donors, files.target, files.folder / "merged")
    if merge is None:
        print(f"{NAME}: {NO_MERGEKIT}", file=sys.stderr)
        return []
    rounds, dense = repeats or REPEATS, files.vector("dense")
    read_back(files_of(*files.donors, files.target, dense))
    plains, fused = [], []
    with ExitStack() as stack:
        # The merged checkpoint has the target's shapes: loading it takes what loading that takes.
        plain = stack.enter_context(started(files, Way(), loads=rounds + 1))
        own = stack.enter_context(started(files, Way.fused(dense), loads=rounds + 1))
        plain.load()
        own.load()
        for _ in range(rounds):
            merge.run()
            plains.append(plain.load().seconds)
            fused.append(own.load().seconds)
    theirs = [sum(pair) for pair in zip(merge.seconds, plains, strict=True)]
    return [
        Row(
            NAME,
            **ratios(theirs, fused),
            goal=20.0,
            at_least=True,
            note=f"{statistics.median(theirs):.1f} / {statistics.median(fused):.2f} s",
        )
    ]


if __name__ == "__main__":
    run(measure, __doc__)
