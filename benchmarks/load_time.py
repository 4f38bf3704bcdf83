"""How long `load_weights` takes with a vector, warm: beside plain, and beside summing eagerly.

Run by `make bench`; alone: `python -m benchmarks.load_time`. All ways load the same target into the
same model, by real vLLM model loaders in this one process, in turn. Files are warm as a read from
the disk leaves them (`page_cache`); a round in which anything still came from the disk, because
others on the machine needed its memory, is thrown away and run again.

The limits are bytes: plain reads one tensor and writes one, a dense vector of the same dtype is one
more to read. They assume stores that write without reading first.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from benchmarks.files import weights_bytes
from benchmarks.frame import Row, ratios, run
from benchmarks.loading import Way
from benchmarks.page_cache import files_of, read_back, read_from_disk_bytes
from tests.support.vllm_model import CreatedModel, engine_config
from vllm_rvec.loader.vllm_api import DefaultModelLoader
from vllm_rvec.vector.reader import VectorReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch

    from benchmarks.files import Files

__all__ = ["measure"]

REPEATS = 15
PLAIN, IN_FLOAT32 = "plain", "each tensor summed first, in float32"
GOALS = {
    "dense bf16, alpha 1": (1.5, "1.5"),
    "dense bf16, alpha 0.3": (1.8, "1.5"),
    "sparse, 90 % unchanged": (1.25, "about 1.2"),
    "int8": (1.4, "1.25"),
    "alpha 0": (None, "1"),
    IN_FLOAT32: (None, ""),
}
COLD_ROUNDS = 3
"""Rounds that may be thrown away before the machine counts as too busy to have warm files."""


def measure(files: Files, repeats: int | None = None) -> list[Row]:
    """Compare each way with plain."""
    warm = files_of(files.target, *(files.vector(kind) for kind in ("dense", "sparse", "int8")))
    read_back(warm)
    seconds = _seconds(_ways(files), repeats or REPEATS, warm)
    plain = seconds.pop(PLAIN)
    target_bytes = weights_bytes(files.target)
    return [_row(name, values, plain, target_bytes) for name, values in seconds.items()]


def _row(name: str, seconds: list[float], plain: list[float], target_bytes: int) -> Row:
    goal, limit = GOALS[name]
    own, other = statistics.median(seconds), statistics.median(plain)
    return Row(
        f"warm load, {name} / plain",
        **ratios(seconds, plain),
        goal=goal,
        limit=limit,
        note=f"{1000 * own:.0f} / {1000 * other:.0f} ms",
        figures={"plain_bytes_per_second": target_bytes / other},
    )


def _ways(files: Files) -> dict[str, Callable[[], float]]:
    from vllm.model_executor.model_loader import get_model_loader

    # One model for all loads: what is measured is moving weights, not first touching memory.
    model = CreatedModel(engine_config(files.target, "safetensors", {}, "bfloat16"))

    def way(way: Way, kind: type | None = None) -> Callable[[], float]:
        config = engine_config(files.target, way.load_format, way.extra, "bfloat16").load_config
        return lambda: model.load((kind or get_model_loader)(config))

    dense = files.vector("dense")
    return {
        PLAIN: way(Way()),
        "dense bf16, alpha 1": way(Way.fused(dense)),
        "dense bf16, alpha 0.3": way(Way.fused(dense, 0.3)),
        "sparse, 90 % unchanged": way(Way.fused(files.vector("sparse"))),
        "int8": way(Way.fused(files.vector("int8"))),
        "alpha 0": way(Way.fused(dense, 0.0)),
        IN_FLOAT32: way(Way(), _eager(dense)),
    }


def _eager(vector: Path) -> type:
    """Make the loader that anyone would write first: sum each tensor, then hand it on."""

    class EagerLoader(DefaultModelLoader):  # type: ignore[misc]
        def get_all_weights(
            self, model_config: Any, model: torch.nn.Module
        ) -> Iterator[tuple[str, torch.Tensor]]:
            reader = VectorReader(vector)
            for name, theta in super().get_all_weights(model_config, model):
                v = reader.tensor(name)
                yield name, theta if v is None else (theta.float() + v.float()).to(theta.dtype)

    return EagerLoader


def _seconds(
    ways: dict[str, Callable[[], float]], repeats: int, warm: list[Path]
) -> dict[str, list[float]]:
    for load in ways.values():
        load()  # thread pools, compiled loops, the model's own memory
    rounds: list[list[float]] = []
    thrown_away = 0
    while len(rounds) < repeats:
        before = read_from_disk_bytes()
        # In turn rather than one after the other: a busy minute on the machine hits all ways alike.
        seconds = [load() for load in ways.values()]
        if read_from_disk_bytes() - before > len(ways) * 1e6 and thrown_away < COLD_ROUNDS:
            thrown_away += 1
            read_back(warm)
            continue
        rounds.append(seconds)
    return {
        name: list(values) for name, values in zip(ways, zip(*rounds, strict=True), strict=True)
    }


if __name__ == "__main__":
    run(measure, __doc__)
