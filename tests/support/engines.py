"""Engines in a process of their own, asked and ended: see `tests.support.answers`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["IN_PROCESS", "answers", "run_json", "run_script"]

SECONDS = 300

IN_PROCESS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""An engine without processes of its own, and with little memory."""


def run_script(script: str, folder: Path, *arguments: str, **env: str) -> Any:
    """Run a script in a process of its own, and return the JSON of the last line that it prints.

    Args:
        script: Its text. It goes into a file: engines' processes import it.
        folder: Where that file goes.
        arguments: Of its command line.
        env: Environment variables for it.
    """
    path = folder / "script.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, str(path), *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **env},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def run_json(module: str, given: Any, env: Mapping[str, str], seconds: float = SECONDS) -> Any:
    """Run a module in a process of its own, with JSON in, and return the JSON of its last line.

    Args:
        module: Of this package; engines run inside of its process.
        given: What it gets on stdin.
        env: Environment variables for it.
        seconds: How long it may take.
    """
    own = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(given),
        env={**os.environ, **own, **env},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def answers(engines: list[dict[str, Any]], **env: str) -> list[list[dict[str, Any]]]:
    """Start engines, one after the other, and return what each answers to the same prompts.

    Args:
        engines: For each the keywords of `vllm.LLM`.
        env: Environment variables for them.
    """
    found: list[list[dict[str, Any]]] = run_json("tests.support.answers", engines, env)
    return found
