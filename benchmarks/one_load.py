"""One load in a fresh process: a child of the benchmarks that need one.

    python -m benchmarks.one_load '{"target": DIR, "load_format": "rvec", "extra": {...}}'

It prints a JSON line when the model is created and empty, waits for a line on stdin (so that its
parent can drop pages, or begin to watch its memory), loads, and prints a JSON line of what it saw.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from benchmarks.page_cache import read_from_disk_bytes


def main() -> None:
    """Create the model, load it as often as asked, print the figures of each load."""
    asked = json.loads(sys.argv[1])
    target = Path(asked["target"]).resolve(strict=True)  # before the imports, which take seconds
    started = time.perf_counter()
    from vllm.model_executor.model_loader import get_model_loader

    from tests.support.vllm_model import CreatedModel, engine_config

    config = engine_config(target, asked["load_format"], asked.get("extra", {}), "bfloat16")
    model = CreatedModel(config)
    _say({"start_seconds": time.perf_counter() - started})
    for _ in range(asked.get("loads", 1)):
        sys.stdin.readline()
        bytes_before, before = read_from_disk_bytes(), resource.getrusage(resource.RUSAGE_SELF)
        seconds = model.load(get_model_loader(config.load_config))
        after = resource.getrusage(resource.RUSAGE_SELF)
        _say(
            {
                "seconds": seconds,
                "read_bytes": read_from_disk_bytes() - bytes_before,
                "page_faults": after.ru_minflt - before.ru_minflt,
            }
        )


def _say(figures: dict[str, float]) -> None:
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
