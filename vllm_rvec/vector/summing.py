"""Write sums of a checkpoint's bytes and vectors into another file, piece by piece, in threads.

What a piece needs is its own: it reads theta by its offset into a buffer that stays in the cache,
adds, and writes to the same offset. So memory does not grow with the tensors, pieces run in any
order, and a piece to which nothing is added is copied byte for byte, whatever its dtype.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from vllm_rvec.arithmetic import BLOCK_ELEMENTS, is_finite
from vllm_rvec.vector.stored import Team, fuse_view

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from vllm_rvec.vector.stored import Term

__all__ = ["PIECE_BYTES", "Piece", "SumWriter"]

PIECE_BYTES = 8 * BLOCK_ELEMENTS
"""Bytes of the target that a piece has at most: few enough for a core's share of the cache, enough
that a piece's system calls don't count."""

MAX_THREADS = 8
"""More don't help: the memory's and the disk's speed are the limit."""

QUEUED_PER_THREAD = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a file, of one tensor."""

    source: int
    """Descriptor of the file that holds theta."""
    sink: int
    """Descriptor of the file to write to."""
    offset_bytes: int
    """Where the stretch begins in both."""
    size_bytes: int
    """At most `PIECE_BYTES`."""
    dtype: torch.dtype | None = None
    """Of theta, where anything is added."""
    terms: tuple[Term, ...] = ()
    """What is added: tensors of the whole tensor's elements, each with its alpha."""
    first_element: int = 0
    """The number of the piece's first element in the whole tensor."""
    on_done: Callable[[bool], None] = lambda _: None
    """Called in the submitting thread when it is written, with whether the sum is finite wherever
    the target's own weights are."""


class SumWriter:
    """Threads that write pieces; a context manager, which does not wait for what is queued."""

    def __init__(self) -> None:
        count = min(MAX_THREADS, len(os.sched_getaffinity(0)))
        self._torch_threads = torch.get_num_threads()
        # Each of these threads would start torch's own for every block.
        self._pool = ThreadPoolExecutor(count, "rvec-sum", torch.set_num_threads, (1,))
        self._queued: deque[tuple[Piece, Future[bool]]] = deque()
        self._limit = count * QUEUED_PER_THREAD
        self._buffers = threading.local()
        self._alone = Team(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._torch_threads)

    def submit(self, piece: Piece) -> None:
        """Queue a piece; waits for an earlier one where the queue is full.

        Raises:
            OSError: A piece could not be read or written.
        """
        if len(self._queued) >= self._limit:
            self._finish_first()
        self._queued.append((piece, self._pool.submit(self._write, piece)))

    def drain(self) -> None:
        """Wait for all pieces; raises as `submit`."""
        while self._queued:
            self._finish_first()

    def _finish_first(self) -> None:
        piece, written = self._queued.popleft()
        piece.on_done(written.result())

    def _write(self, piece: Piece) -> bool:
        theta, out = self._own_buffers()
        _read(piece.source, theta[: piece.size_bytes], piece.offset_bytes)
        if piece.dtype is None:
            _write(piece.sink, theta[: piece.size_bytes], piece.offset_bytes)
            return True
        weights = theta[: piece.size_bytes].view(piece.dtype)
        # The buffer holds the elements from the first one on: the whole tensor would begin before.
        fuse_view(
            weights,
            int(weights.storage_offset()) - piece.first_element,
            piece.terms,
            out[: piece.size_bytes].view(piece.dtype),
            self._alone,
        )
        _write(piece.sink, out[: piece.size_bytes], piece.offset_bytes)
        return _is_finite(out, piece) or not _is_finite(theta, piece)

    def _own_buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        if not hasattr(self._buffers, "pair"):
            self._buffers.pair = torch.empty(2, PIECE_BYTES, dtype=torch.uint8).unbind()
        pair: tuple[torch.Tensor, torch.Tensor] = self._buffers.pair
        return pair


def _is_finite(buffer: torch.Tensor, piece: Piece) -> bool:
    return piece.dtype is None or is_finite(buffer[: piece.size_bytes].view(piece.dtype))


def _read(descriptor: int, into: torch.Tensor, offset: int) -> None:
    left = into.numpy().data
    while left:
        count = os.preadv(descriptor, [left], offset)
        if count == 0:
            raise OSError("the target's file became shorter while it was read")
        left, offset = left[count:], offset + count


def _write(descriptor: int, data: torch.Tensor, offset: int) -> None:
    left = data.numpy().data
    while left:
        count = os.pwrite(descriptor, left, offset)
        left, offset = left[count:], offset + count
