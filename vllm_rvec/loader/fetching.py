"""Find a vector in an engine's process: what takes long is told in the engine's log."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from vllm_rvec.vector.fetching import locate_vector

if TYPE_CHECKING:
    from vllm_rvec.checkpoint.fetch import Located

__all__ = ["find_vector"]

# vLLM gives handlers to loggers under its own name only; others vanish in engine processes.
logger = logging.getLogger("vllm.rvec")

FIRST_LINE_SECONDS = 2.0
NEXT_LINE_SECONDS = 10.0


def find_vector(reference: str) -> Located:
    """Find a vector's folder as `locate_vector` does, with lines in the log while it is fetched."""
    due = time.monotonic() + FIRST_LINE_SECONDS

    def on_progress(done: int, total: int) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + NEXT_LINE_SECONDS
            logger.info("Fetching the vector: %.0f of %.0f MB", done / 1e6, total / 1e6)

    def notify(line: str) -> None:
        logger.info("Fetching the vector: %s", line)

    return locate_vector(reference, on_progress=on_progress, notify=notify)
