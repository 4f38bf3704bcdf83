"""Single weights of a checkpoint, read without torch: a few bytes of each tensor asked for."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from vllm_rvec.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from vllm_rvec.checkpoint.table import TensorInfo, TensorTable

__all__ = ["read_weights"]

STORED: Final[dict[str, np.dtype[Any]]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
"""numpy's dtype for what a file holds; numpy knows no bfloat16, which is float32's upper half."""

READERS = 8
"""Threads: a file that is not in memory, on a network's disk say, answers each read on its own."""


def read_weights(
    table: TensorTable, wanted: Mapping[str, npt.NDArray[np.int64]]
) -> dict[str, npt.NDArray[np.float32]]:
    """Read weights at flat positions.

    Args:
        table: The checkpoint's tensors.
        wanted: Positions by tensor name, all within the tensor.

    Returns:
        float32 values by name; without the tensors whose dtype is none of F32, BF16, F16.

    Raises:
        CheckpointError: A file can't be read, or is shorter than its header says.
    """
    infos = {name: table[name] for name in wanted if table[name].dtype in STORED}
    shards = sorted({info.shard for info in infos.values()})
    try:
        with ExitStack() as stack, ThreadPoolExecutor(READERS, "rvec-weights") as pool:
            files = {s: stack.enter_context(s.open("rb", buffering=0)).fileno() for s in shards}
            for file in files.values():
                # Without this each read of two bytes fetches 128 KiB.
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
            values = pool.map(
                lambda name: _read(files[infos[name].shard], infos[name], wanted[name]), infos
            )
            return dict(zip(infos, values, strict=True))
    except OSError as exc:
        raise CheckpointError(
            "the target's weights can't be read", why=str(exc), fix="download the checkpoint again"
        ) from exc


def _read(file: int, info: TensorInfo, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    dtype = STORED[info.dtype]
    offsets = (info.offset_bytes + positions * dtype.itemsize).tolist()
    data = b"".join(os.pread(file, dtype.itemsize, offset) for offset in offsets)
    if len(data) != len(offsets) * dtype.itemsize:
        raise OSError(f"{info.shard} is shorter than its header says")
    stored = np.frombuffer(data, dtype)
    if info.dtype == "BF16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    values: npt.NDArray[np.float32] = stored.astype(np.float32)
    return values
