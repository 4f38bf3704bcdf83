"""How much private memory a load takes at its peak, beyond a plain one's.

Run by `make bench`; alone: `python -m benchmarks.peak_memory`. Each way is a fresh process whose
anonymous memory (RssAnon: no mapped files) is read from outside every 2 ms while it loads. Its
first load counts, so imports and compiled loops that a load waits for are in it. The figure is the
excess over plain as a share of what is allowed: the target's largest tensor and 64 MB.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from benchmarks.frame import Row, run
from benchmarks.loading import Way, started

if TYPE_CHECKING:
    from benchmarks.files import Files

__all__ = ["measure"]

REPEATS = 3
KINDS = ("dense", "sparse", "int8")
ALLOWANCE_BYTES = 64_000_000


def measure(files: Files, repeats: int | None = None) -> list[Row]:
    """Compare the peak of each encoding with plain."""
    ways = {"plain": Way()} | {kind: Way.fused(files.vector(kind), 0.3) for kind in KINDS}
    peaks: dict[str, list[int]] = {name: [] for name in ways}
    for _ in range(repeats or REPEATS):
        for name, way in ways.items():
            with started(files, way) as loader:
                peaks[name].append(loader.load().peak_bytes)
    allowed = files.largest_tensor_bytes + ALLOWANCE_BYTES
    return [_row(kind, peaks[kind], peaks["plain"], allowed) for kind in KINDS]


def _row(kind: str, fused: list[int], plain: list[int], allowed: int) -> Row:
    excess = [own - other for own, other in zip(fused, plain, strict=True)]
    return Row(
        f"peak private memory above plain, {kind} / allowed",
        tuple(count / allowed for count in excess),
        1.0,
        limit="0",
        note=f"{statistics.median(excess) / 1e6:.0f} of {allowed / 1e6:.0f} MB",
    )


if __name__ == "__main__":
    run(measure, __doc__)
