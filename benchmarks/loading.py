"""Start `one_load` children: fresh processes that wait before each load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from benchmarks.files import Files

__all__ = ["Load", "Loader", "Way", "started"]

SAMPLE_SECONDS = 0.002


@dataclass(frozen=True, slots=True)
class Way:
    """A way to load the target."""

    load_format: str = "safetensors"
    vector: Path | None = None
    alpha: float = 1.0

    @property
    def extra(self) -> dict[str, object]:
        """What stands in --model-loader-extra-config."""
        return {} if self.vector is None else {"vector": str(self.vector), "alpha": self.alpha}

    @classmethod
    def fused(cls, vector: Path, alpha: float = 1.0) -> Way:
        """Load with a vector added."""
        return cls("rvec", vector, alpha)


@dataclass(frozen=True, slots=True)
class Load:
    """What was seen of one load."""

    seconds: float
    read_bytes: int
    """From the disk."""
    page_faults: int
    peak_bytes: int
    """Private memory: the most while it ran, beyond what there was before."""


class Loader:
    """A child that has created the model and waits."""

    def __init__(self, child: subprocess.Popen[str], start_seconds: float) -> None:
        self._child = child
        self.start_seconds = start_seconds
        """Imports, configuration, creating the model."""

    def load(self) -> Load:
        """Let it load once, and watch its private memory from outside meanwhile."""
        stop, peaks = threading.Event(), [_private_bytes(self._child.pid)]
        before = peaks[0]
        watcher = threading.Thread(target=_watch, args=(self._child.pid, stop, peaks))
        watcher.start()
        try:
            assert self._child.stdin is not None
            print(file=self._child.stdin, flush=True)
            figures = _next(self._child)
        finally:
            stop.set()
            watcher.join()
        return Load(
            seconds=figures["seconds"],
            read_bytes=int(figures["read_bytes"]),
            page_faults=int(figures["page_faults"]),
            peak_bytes=max(peaks) - before,
        )


@contextmanager
def started(
    files: Files, way: Way, *, loads: int = 1, env: Mapping[str, str] | None = None
) -> Iterator[Loader]:
    """Start a child for one way of loading; it has ended when the block has."""
    asked = {
        "target": str(files.target),
        "load_format": way.load_format,
        "extra": way.extra,
        "loads": loads,
    }
    command = [sys.executable, "-m", "benchmarks.one_load", json.dumps(asked)]
    environment = {"VLLM_LOGGING_LEVEL": "ERROR"} | os.environ | dict(env or {})
    with subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        try:
            yield Loader(child, _next(child)["start_seconds"])
        finally:
            child.kill()


def _next(child: subprocess.Popen[str]) -> dict[str, float]:
    out: IO[str] | None = child.stdout
    assert out is not None
    for line in out:
        if line.startswith("{"):
            figures: dict[str, float] = json.loads(line)
            return figures
    raise RuntimeError(f"the load ended with status {child.wait()}; its errors are above")


def _watch(pid: int, stop: threading.Event, seen: list[int]) -> None:
    while not stop.is_set():
        seen.append(_private_bytes(pid))
        time.sleep(SAMPLE_SECONDS)


def _private_bytes(pid: int) -> int:
    """Return a process's anonymous memory: what is neither a mapped file nor shared."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
