"""Find vectors and a target's files in an engine's process.

What takes long is told in the engine's log.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import try_to_load_from_cache

from vllm_rvec.checkpoint.table import is_folder
from vllm_rvec.vector.fetching import locate_vector

if TYPE_CHECKING:
    from vllm_rvec.checkpoint.fetch import Located
    from vllm_rvec.loader.vllm_api import ModelConfig

__all__ = ["find_vector", "target_file"]

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


def target_file(model_config: ModelConfig, name: str) -> Path | None:
    """Find a file of the target: in its folder, or where the Hub's client keeps it.

    Returns:
        In a folder, its path, whether it is there or not. None for what vLLM streams from
        elsewhere, or what is not in the Hub's cache.
    """
    folder = Path(model_config.model)
    if is_folder(folder):
        return folder / name
    try:
        found = try_to_load_from_cache(model_config.model, name, revision=model_config.revision)
    except ValueError:  # no Hub id either
        return None
    return Path(found) if isinstance(found, str) else None
