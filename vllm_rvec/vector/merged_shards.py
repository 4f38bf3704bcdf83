"""Write a target's shards again, with vectors added to their tensors.

A new shard has its original's header and length; only the bytes of tensors to which something is
added differ. Not here: whether the vectors belong to the target (`merge`), how a piece is summed
(`summing`).
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from vllm_rvec.arithmetic import FLOAT_DTYPES
from vllm_rvec.checkpoint.dtypes import TORCH_DTYPES
from vllm_rvec.vector.summing import PIECE_BYTES, Piece, SumWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from typing import BinaryIO

    import torch

    from vllm_rvec.checkpoint.table import TensorInfo, TensorTable
    from vllm_rvec.vector.addend import Addend
    from vllm_rvec.vector.stored import Term

__all__ = ["ShardMerger"]

RELEASE_BYTES = 8 << 20
"""How much of a tensor is written before the pages of what was added are given back."""


@dataclass(slots=True)
class ShardMerger:
    """One pass over a target's shards, and what was seen on the way."""

    table: TensorTable
    """The target's tensors."""
    addends: Sequence[Addend]
    """What is added, in this order."""
    on_progress: Callable[[int, int], None] | None = None
    """Called with the bytes written and the bytes in all."""
    changed: list[str] = field(default_factory=list)
    """Tensors to which something was added."""
    spoilt: list[str] = field(default_factory=list)
    """Those that hold NaN or infinity where the target's own weights are finite."""
    total_bytes: int = field(init=False)
    """What the shards take on disk."""
    _written_bytes: int = 0

    def __post_init__(self) -> None:
        self.total_bytes = sum(shard.stat().st_size for shard in self._shards())

    def write(self, folder: Path) -> None:
        """Write all shards to a folder that has none of them, and wait until the disk has them.

        Raises:
            OSError: A file can't be read or written.
            VectorCorruptError: A vector's parts can't be read, or contradict each other.
        """
        # A finished shard is made durable while the next one is written.
        with ThreadPoolExecutor(1, "rvec-sync") as syncer:
            synced = [
                self._write_shard(syncer, shard, folder / shard.name) for shard in self._shards()
            ]
            for job in synced:
                job.result()

    def _shards(self) -> list[Path]:
        return sorted({info.shard for info in self.table.values()})

    def _write_shard(self, syncer: ThreadPoolExecutor, source: Path, sink: Path) -> Future[None]:
        own = [(name, info) for name, info in self.table.items() if info.shard == source]
        # The writer's threads end before the files are closed, after an error too: another file
        # could get the same descriptor.
        with source.open("rb") as theta, sink.open("xb") as out, SumWriter() as writer:
            size_bytes = os.fstat(theta.fileno()).st_size
            os.ftruncate(out.fileno(), size_bytes)
            files, end = (theta, out), 0
            for name, info in sorted(own, key=lambda item: item[1].offset_bytes):
                self._submit(writer, files, _Stretch(end, info.offset_bytes))
                end = info.offset_bytes + info.size_bytes
                self._submit(writer, files, self._sum(name, info))
            self._submit(writer, files, _Stretch(end, size_bytes))
            writer.drain()
            return syncer.submit(_sync, os.dup(out.fileno()))

    def _sum(self, name: str, info: TensorInfo) -> _Stretch:
        """Find what is added to a tensor."""
        stretch = _Stretch(info.offset_bytes, info.offset_bytes + info.size_bytes, name)
        dtype = TORCH_DTYPES.get(info.dtype)
        if dtype not in FLOAT_DTYPES or info.size_bytes == 0:
            return stretch
        for addend in self.addends:
            if (term := addend.term(name, info.shape)) is not None:
                part = addend.pairing.part_for(name) or name
                stretch.terms.append(term)
                stretch.releases.append(partial(addend.reader.release, part))
        if stretch.terms:
            stretch.dtype = dtype
            self.changed.append(name)
        return stretch

    def _submit(
        self, writer: SumWriter, files: tuple[BinaryIO, BinaryIO], stretch: _Stretch
    ) -> None:
        source, sink = (file.fileno() for file in files)
        for offset, size in _pieces(stretch.start, stretch.end):
            piece = Piece(
                source,
                sink,
                offset,
                size,
                dtype=stretch.dtype,
                terms=tuple(stretch.terms),
                first_element=stretch.first_element(offset),
                on_done=partial(self._piece_is_written, stretch, size),
            )
            writer.submit(piece)

    def _piece_is_written(self, stretch: _Stretch, size_bytes: int, is_finite: bool) -> None:
        stretch.piece_is_written(size_bytes)
        if not is_finite and stretch.name not in self.spoilt:
            self.spoilt.append(stretch.name)
        self._written_bytes += size_bytes
        if self.on_progress is not None:
            self.on_progress(self._written_bytes, self.total_bytes)


@dataclass(slots=True)
class _Stretch:
    """Part of a shard: a header, or a tensor with what is added to it."""

    start: int
    """Offset in bytes."""
    end: int
    name: str = ""
    dtype: torch.dtype | None = None
    """Of the tensor, where anything is added to it."""
    terms: list[Term] = field(default_factory=list)
    """Tensors of the whole stretch's elements, with their alphas."""
    releases: list[Callable[[], None]] = field(default_factory=list)
    """Give back the pages of what is added; those of a piece at work come again by themselves."""
    unreleased_bytes: int = 0
    written_bytes: int = 0

    def first_element(self, offset: int) -> int:
        """Number the element at an offset in the file, counted from the tensor's first."""
        return 0 if self.dtype is None else (offset - self.start) // self.dtype.itemsize

    def piece_is_written(self, size_bytes: int) -> None:
        """Give pages back, now and then and at the end."""
        self.written_bytes += size_bytes
        self.unreleased_bytes += size_bytes
        is_whole = self.written_bytes == self.end - self.start
        if is_whole or self.unreleased_bytes >= RELEASE_BYTES:
            self.unreleased_bytes = 0
            for release in self.releases:
                release()


def _pieces(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut a stretch of a file: offsets and sizes in bytes."""
    return ((offset, min(PIECE_BYTES, end - offset)) for offset in range(start, end, PIECE_BYTES))


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
