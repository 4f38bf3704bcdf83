"""Engines in a process of their own, asked and ended: see `tests.support.answers`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

__all__ = ["answers"]

SECONDS = 300


def answers(engines: list[dict[str, Any]], **env: str) -> list[list[dict[str, Any]]]:
    """Start engines, one after the other, and return what each answers to the same prompts.

    Args:
        engines: For each the keywords of `vllm.LLM`.
        env: Environment variables for them.
    """
    own = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.answers"],
        input=json.dumps(engines),
        env={**os.environ, **own, **env},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    found: list[list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return found
