"""What can be known wrong before an engine is started: milliseconds in place of half a minute.

Without torch. The vector's bytes are verified here, once for all engines; whether it belongs to the
target is checked on headers, tokens and a few weights. The loader checks that again, on what really
streams by.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_rvec.checkpoint.table import is_folder, why_no_folder
from vllm_rvec.errors import CheckpointNotFoundError
from vllm_rvec.vector.compatibility import check_target
from vllm_rvec.vector.fetching import locate_vector
from vllm_rvec.vector.reader import VectorReader
from vllm_rvec.vector.verification import verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vllm_rvec.serve.config import ServeConfig
    from vllm_rvec.serve.mode import Mode
    from vllm_rvec.vector.compatibility import Report

__all__ = ["Preflight", "check_files"]


@dataclass(frozen=True, slots=True)
class Preflight:
    """What was found before any engine is started."""

    reports: tuple[Report, ...]
    """Whether each vector belongs to the target; empty for a target on the Hub, which vLLM fetches
    and the loader checks."""


def check_files(
    config: ServeConfig,
    mode: Mode = "fused",
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> Preflight:
    """Make sure that target and vector can be read, are sound, and belong together.

    Args:
        config: Names target and vectors; with `force` a report that refuses is no error.
        mode: As `choose_mode` has it; with a dial, the target may be quantized.
        on_progress: Called with the bytes verified and the bytes in all, unless an earlier
            verification is remembered.

    Raises:
        CheckpointError: The target is a path and can't be read.
        VectorFormatError: There is no vector, or it is not one.
        VectorCorruptError: The vector's shards are damaged, or hold NaN or infinity.
        IncompatibleVectorError: The vector does not belong to the target; all mismatches at once.
    """
    vectors = [VectorReader(locate_vector(vector.path).folder) for vector in config.recipe]
    target = _local_target(config.model)
    # The cheap answers before the pass over all bytes.
    reports = () if target is None else tuple(_reports(config, mode, vectors, target))
    for report in reports:
        report.raise_if_refused(config.force)
    for vector in vectors:
        verify(vector, on_progress=on_progress)
    return Preflight(reports)


def _reports(
    config: ServeConfig, mode: Mode, vectors: Sequence[VectorReader], target: Path
) -> Iterator[Report]:
    for vector, said in zip(vectors, config.recipe, strict=True):
        recipe = said if config.is_recipe else None
        yield check_target(
            vector,
            target,
            vocabulary=config.vocabulary,
            recipe=recipe,
            is_beside=mode == "dial",
        )


def _local_target(model: str) -> Path | None:
    folder = Path(model)
    if is_folder(folder):
        return folder
    if (why := why_no_folder(folder)) == "it is a file" or _looks_like_a_path(model):
        raise CheckpointNotFoundError(
            f"there is no target {model}",
            why=why,
            fix="give a folder with config.json and safetensors files, or a Hub id (owner/name)",
            path=folder,
        )
    return None


def _looks_like_a_path(model: str) -> bool:
    return model.startswith(("/", ".", "~")) or model.count("/") != 1
