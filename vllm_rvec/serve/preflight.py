"""What can be known wrong before an engine is started: milliseconds in place of half a minute.

Reads headers only, and without torch. The loader checks again, on what really streams by, and it
alone looks at values.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_rvec.checkpoint.table import (
    FLOAT_DTYPES,
    is_folder,
    read_config,
    read_table,
    why_no_folder,
)
from vllm_rvec.errors import CheckpointNotFoundError
from vllm_rvec.vector.compatibility import check_architecture, check_tensors
from vllm_rvec.vector.reader import VectorReader

if TYPE_CHECKING:
    from vllm_rvec.vector.manifest import Manifest

__all__ = ["check_files"]


def check_files(model: str, vector: str) -> None:
    """Make sure that target and vector can be read and belong together.

    A target that is a Hub id is left to vLLM, which fetches it.

    Args:
        model: The target: a local folder or a Hub id.
        vector: The stored vector's folder.

    Raises:
        CheckpointError: The target is a path and can't be read.
        VectorFormatError: There is no vector, or it is not one.
        VectorCorruptError: The vector's shards are damaged.
        IncompatibleVectorError: The vector does not belong to the target; all mismatches at once.
    """
    manifest = VectorReader(Path(vector)).manifest
    folder = Path(model)
    if is_folder(folder):
        _check_target(folder, manifest)
    elif (why := why_no_folder(folder)) == "it is a file" or _looks_like_a_path(model):
        raise CheckpointNotFoundError(
            f"there is no target {model}",
            why=why,
            fix="give a folder with config.json and safetensors files, or a Hub id (owner/name)",
            path=folder,
        )


def _check_target(folder: Path, manifest: Manifest) -> None:
    check_architecture(manifest, read_config(folder), target=str(folder))
    table = read_table(folder)
    check_tensors(
        manifest,
        {name: info.shape for name, info in table.items()},
        target=str(folder),
        quantized=[name for name, info in table.items() if info.dtype not in FLOAT_DTYPES],
    )


def _looks_like_a_path(model: str) -> bool:
    return model.startswith(("/", ".", "~")) or model.count("/") != 1
