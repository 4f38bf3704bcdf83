"""How long another alpha takes on a live engine, against loading the model at that alpha.

    python -m benchmarks.live_alpha

A 0.5B-shaped Qwen2 target and an equally large dense bf16 vector are made in a temporary folder
(about 4 GB with the donors). Loading is what an engine's start does from an empty model on: read,
fuse, make into the kernels' layout. Changing is what each of its workers does. Starting processes,
profiling, compiling and draining are in neither; a start pays for the first three, a change for the
last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.checkpoints import make_checkpoints
from tests.support.vllm_model import LoadedModel, engine_config
from vllm_rvec.vector.extract import extract

ALPHAS = (1.0, 0.3)


def main() -> None:
    """Make the files, load and change in turn, print seconds and ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="rounds; the median counts")
    parser.add_argument("--layers", type=int, default=24, help="24 is Qwen2-0.5B")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rvec-bench-") as folder:
        make_checkpoints(Path(folder), options.layers, ("base", "tuned", "target"))
        target, vector = Path(folder, "target"), Path(folder, "vector")
        extract(
            Path(folder, "tuned"), Path(folder, "base"), vector, dtype="bfloat16", encoding="dense"
        )
        rows = {
            f"alpha {alpha:g}": _measure(target, vector, alpha, options.repeats) for alpha in ALPHAS
        }
    json.dump({"threads": torch.get_num_threads(), **rows}, sys.stdout, indent=1)
    print()


def _measure(target: Path, vector: Path, alpha: float, repeats: int) -> dict[str, float]:
    extra: dict[str, object] = {"vector": str(vector), "alpha": alpha}
    live = LoadedModel(engine_config(target, "rvec", {**extra, "alpha": 0.0}, "bfloat16"))
    worker = live.worker
    worker.rvec_note_files()
    loads, changes = [], []
    for _ in range(repeats):
        fresh = LoadedModel(engine_config(target, "rvec", extra, "bfloat16"))
        loads.append(fresh.load_seconds)
        del fresh
        worker.rvec_reload({**extra, "alpha": 0.0})
        started = time.perf_counter()
        worker.rvec_reload(extra)
        changes.append(time.perf_counter() - started)
    ratios = [change / load for change, load in zip(changes, loads, strict=True)]
    return {
        "load_seconds": round(statistics.median(loads), 3),
        "change_seconds": round(statistics.median(changes), 3),
        "ratio": round(statistics.median(ratios), 2),
    }


if __name__ == "__main__":
    main()
