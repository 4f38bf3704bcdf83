"""How long `load_weights` takes: plain, fused by us, fused by summing whole tensors first.

Run by `make bench`. A 0.5B-shaped Qwen2 target and an equally large dense bf16 vector are made in
a temporary folder (1.9 GB), read once so that the page cache is warm, and loaded in turn by real
vLLM model loaders in this one process. The limit for a dense vector is 1.5 times plain: read two
and write one, against read one and write one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.checkpoints import make_checkpoints
from tests.support.vllm_model import CreatedModel, engine_config
from vllm_rvec.loader.vllm_api import DefaultModelLoader
from vllm_rvec.vector.extract import extract

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def main() -> None:
    """Make the files, measure each way in turn, print ratios to the plain load."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15, help="rounds; the median counts")
    parser.add_argument("--layers", type=int, default=24, help="24 is Qwen2-0.5B")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rvec-bench-") as folder:
        target, vector = _make_files(Path(folder), options.layers)
        seconds = _measure(_ways(target, vector), options.repeats)
    _report(seconds, as_json=options.json)


def _ways(target: Path, vector: Path) -> dict[str, Callable[[], float]]:
    from vllm.model_executor.model_loader import get_model_loader

    # One model for all loads: what is measured is moving weights, not first touching memory.
    model = CreatedModel(engine_config(target, "safetensors", {}, "bfloat16"))

    def way(load_format: str, kind: type | None = None, **extra: object) -> Callable[[], float]:
        config = engine_config(target, load_format, extra, "bfloat16").load_config
        return lambda: model.load((kind or get_model_loader)(config))

    return {
        "plain": way("safetensors"),
        "rvec, alpha 0": way("rvec", vector=str(vector), alpha=0.0),
        "rvec, alpha 1": way("rvec", vector=str(vector), alpha=1.0),
        "rvec, alpha 0.3": way("rvec", vector=str(vector), alpha=0.3),
        "eager, torch.add": way("safetensors", _eager(vector, _add)),
        "eager, in float32": way("safetensors", _eager(vector, _add_in_float32)),
    }


def _add(theta: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.add(theta, v)


def _add_in_float32(theta: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (theta.float() + v.float()).to(theta.dtype)


def _eager(vector: Path, add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> type:
    """Make the loader that anyone would write first: sum each tensor, then hand it on."""
    from vllm_rvec.vector.reader import VectorReader

    class EagerLoader(DefaultModelLoader):  # type: ignore[misc]
        def get_all_weights(
            self, model_config: Any, model: torch.nn.Module
        ) -> Iterator[tuple[str, torch.Tensor]]:
            reader = VectorReader(vector)
            for name, theta in super().get_all_weights(model_config, model):
                v = reader.tensor(name)
                yield name, theta if v is None else add(theta, v)

    return EagerLoader


def _measure(ways: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()  # page cache, thread pools, the one look for NaN
    # In turn rather than one after the other: a busy minute on the machine hits all ways alike.
    for _ in range(repeats):
        for name, run in ways.items():
            seconds[name].append(run())
    return seconds


def _report(seconds: dict[str, list[float]], *, as_json: bool) -> None:
    # Ratios within one round: rounds differ on a shared machine, neighbours in a round hardly.
    ratios = {
        name: statistics.median(
            s / plain for s, plain in zip(values, seconds["plain"], strict=True)
        )
        for name, values in seconds.items()
    }
    if as_json:
        rows = {n: {"ratio": ratios[n], "seconds": values} for n, values in seconds.items()}
        json.dump({"threads": torch.get_num_threads(), "ways": rows}, sys.stdout, indent=1)
        return
    table = Table(title=f"load_weights, Qwen2-0.5B shape, {torch.get_num_threads()} threads")
    for column in ("way", "median s", "fastest s", "ratio to plain"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, values in seconds.items():
        cells = (statistics.median(values), min(values), ratios[name])
        table.add_row(name, *(f"{cell:.3f}" for cell in cells[:2]), f"{cells[2]:.2f}")
    Console().print(table)


def _make_files(folder: Path, layers: int) -> tuple[Path, Path]:
    make_checkpoints(folder, layers, ("base", "tuned", "target"))
    donors = folder / "tuned", folder / "base"
    extract(*donors, folder / "vector", dtype="bfloat16", encoding="dense")
    return folder / "target", folder / "vector"


if __name__ == "__main__":
    main()
