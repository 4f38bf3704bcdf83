"""Read a checkpoint's tensors one at a time, memory-mapped.

safetensors validates the file (`table`); the tensors are then views made straight on the mapping.
Its own `get_tensor` gives the same views, at a cost for each that shows in a fused load of a small
model.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_rvec.checkpoint.dtypes import TORCH_DTYPES
from vllm_rvec.checkpoint.stamps import Stamp
from vllm_rvec.checkpoint.table import read_table
from vllm_rvec.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from typing import BinaryIO

    from vllm_rvec.checkpoint.table import TensorInfo, TensorTable

__all__ = ["CheckpointReader"]


class CheckpointReader:
    """A folder's tensors by name.

    Tensors are views of the mapped file: nothing is read before it is used. A file stays mapped
    while the reader or one of its tensors is there. They are private copies on write, so writing
    into one never reaches the file.

    Each tensor is given out only while its file is as it was: a file that another process cuts
    short under a mapping ends whoever reads there with SIGBUS. Who reads later asks again by
    `check_unchanged`. What is left of the danger is the time from then until the tensor has been
    read: replace files by renaming new ones.

    Args:
        folder: A checkpoint folder, as `read_table` takes it.
        table: Its tensor table, where the caller has read it already.
        stamps: How its shards were then; as they are now where None.

    Raises:
        CheckpointError: As for `read_table`.
    """

    def __init__(
        self,
        folder: Path,
        table: TensorTable | None = None,
        stamps: Mapping[Path, Stamp] | None = None,
    ) -> None:
        self.folder = folder
        self.table = read_table(folder) if table is None else table
        self._stamps = dict(stamps or {})
        self._files: dict[Path, BinaryIO] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._sizes: dict[Path, int] = {}
        self._lock = threading.Lock()  # several threads may ask for tensors

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor, on the CPU, in the dtype and shape of the file.

        Raises:
            KeyError: The checkpoint has no such tensor.
            CheckpointError: The file can't be read, or has changed since its header was.
        """
        info = self.table[name]
        try:
            mapped = self._map(info.shard)
            self._check(info.shard)
            return _view(mapped, info)
        except (OSError, ValueError, KeyError) as exc:
            raise CheckpointError(
                f"tensor {name!r} can't be read from {info.shard}",
                why=f"{type(exc).__name__}: {exc}",
                path=info.shard,
                tensor_name=name,
            ) from exc

    def release(self, name: str, first_bytes: int | None = None) -> None:
        """Let go of the memory that holds a tensor's pages; reading them again is a page fault.

        For passes over checkpoints that are larger than the memory they may take. What has been
        written into the tensor is lost.

        Args:
            name: The tensor.
            first_bytes: How much of it, from its beginning; all of it where None.
        """
        info = self.table[name]
        size_bytes = info.size_bytes if first_bytes is None else first_bytes
        if (mapped := self._maps.get(info.shard)) is None:
            return
        # Whole pages inside the tensor only: its neighbours may be in use.
        start = -(-info.offset_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (info.offset_bytes + size_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start:
            mapped.madvise(mmap.MADV_DONTNEED, start, end - start)

    def check_unchanged(self, names: Iterable[str] | None = None) -> None:
        """Make sure that what was given out came from files that are still as they were.

        Args:
            names: Tensors that were given out; all where None.

        Raises:
            CheckpointError: A file was written to or cut short meanwhile; what was read of it may
                be of both.
        """
        shards = list(self._maps) if names is None else {self.table[n].shard for n in names}
        for shard in shards:
            try:
                self._check(shard)
            except (OSError, ValueError) as exc:
                raise CheckpointError(
                    f"{shard} has changed while it was read", why=str(exc), path=shard
                ) from exc

    def _map(self, shard: Path) -> mmap.mmap:
        if (mapped := self._maps.get(shard)) is not None:
            return mapped
        with self._lock:
            if shard not in self._maps:
                self._maps[shard] = self._mapped(shard)
            return self._maps[shard]

    def _mapped(self, shard: Path) -> mmap.mmap:
        file = self._files[shard] = shard.open("rb")
        weakref.finalize(self, file.close)  # only checks need it; the mapping has its own
        self._stamps.setdefault(shard, Stamp.of(file.fileno()))
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if len(mapped) != self._size_bytes(shard):
            raise ValueError(f"it had {self._size_bytes(shard)} bytes, now {len(mapped)}")
        with suppress(OSError):  # not every kernel has large pages of files
            # Pages that are read from now on are large ones: a tenth of the page faults, or less.
            mapped.madvise(mmap.MADV_HUGEPAGE)
        return mapped

    def _check(self, shard: Path) -> None:
        """Raise ValueError if a mapped file is not as it was when it was first looked at."""
        if change := self._stamps[shard].change(Stamp.of(self._files[shard].fileno())):
            raise ValueError(change)

    def _size_bytes(self, shard: Path) -> int:
        """Return a file's size by its header: data ends where the file does."""
        if not self._sizes:
            for info in self.table.values():
                end = info.offset_bytes + info.size_bytes
                self._sizes[info.shard] = max(end, self._sizes.get(info.shard, 0))
        return self._sizes[shard]


def _view(file: mmap.mmap, info: TensorInfo) -> torch.Tensor:
    dtype = TORCH_DTYPES[info.dtype]
    if info.size_bytes == 0:
        return torch.empty(info.shape, dtype=dtype)
    if info.offset_bytes % dtype.itemsize:
        # A copy is aligned. Not by PyTorch: its threads would spin beside those that use the copy.
        own = np.frombuffer(file, np.uint8, info.size_bytes, info.offset_bytes).copy()
        return torch.from_numpy(own).view(dtype).view(info.shape)
    count = info.size_bytes // dtype.itemsize
    return torch.frombuffer(file, dtype=dtype, count=count, offset=info.offset_bytes).view(
        info.shape
    )
