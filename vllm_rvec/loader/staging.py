"""Memory of the host through which tensors go to a device.

A copy from pinned memory runs on its own; one from any other memory holds up whoever asked for it.
Not for: what is sent, and where.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Staging", "wait_for"]

BUFFERS = 3
"""Buffers that take turns: one is filled while one crosses the bus and one waits."""

ALIGNMENT = 64
"""Of the tensors that are sent together, in bytes: a multiple of every dtype's size."""


class Staging:
    """Buffers of the host that take turns, made when they are first needed.

    Everything is enqueued on the device's current stream. A buffer is filled anew only when its
    copy has ended.

    Args:
        device: Where what is staged goes.
        is_pinned: Whether through pinned memory, where the device is a GPU.

    Attributes:
        sent_bytes: What has been sent.
    """

    def __init__(self, device: torch.device, *, is_pinned: bool) -> None:
        self.device = device
        self.sent_bytes = 0
        self._is_pinned = is_pinned and device.type == "cuda"
        self._is_direct = not is_pinned
        self._turns = itertools.cycle(range(BUFFERS))
        self._buffers: list[torch.Tensor | None] = [None] * BUFFERS
        self._events: list[torch.cuda.Event | None] = [None] * BUFFERS

    def send(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy tensors to new memory of the device, together.

        Args:
            tensors: On the CPU, of any strides.

        Returns:
            Contiguous copies. The tensors themselves are not read after the call returns.
        """
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
        there = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        copies = _cut(there, sizes, tensors)
        self.sent_bytes += sum(tensor.nbytes for tensor in tensors)
        if self._is_direct:
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor)
            return copies
        turn, buffer = self._next(there.numel())
        for staged, tensor in zip(_cut(buffer, sizes, tensors), tensors, strict=True):
            staged.copy_(tensor)
        there.copy_(buffer, non_blocking=self._is_pinned)
        self._note_sent(turn)
        return copies

    def fill(self, out: torch.Tensor, write: Callable[[torch.Tensor], object]) -> None:
        """Have a tensor of the device written by way of a buffer.

        Args:
            out: On the device, of any strides.
            write: Writes to a contiguous tensor on the CPU, of out's shape and dtype.
        """
        turn, buffer = self._next(out.numel() * out.itemsize)
        staged = buffer.view(out.dtype).view(out.shape)
        write(staged)
        out.copy_(staged, non_blocking=self._is_pinned)
        self.sent_bytes += staged.nbytes
        self._note_sent(turn)

    def _next(self, size_bytes: int) -> tuple[int, torch.Tensor]:
        """Take the buffer whose turn it is, once it is free, and as much of it as is asked for."""
        turn = next(self._turns)
        if (event := self._events[turn]) is not None:
            event.synchronize()
        buffer = self._buffers[turn]
        if buffer is None or buffer.numel() < size_bytes:
            self._buffers[turn] = None  # not two at a time
            buffer = torch.empty(
                size_bytes, dtype=torch.uint8, device="cpu", pin_memory=self._is_pinned
            )
            self._buffers[turn] = buffer
        return turn, buffer[:size_bytes]

    def _note_sent(self, turn: int) -> None:
        if self._is_pinned:
            event = self._events[turn] or torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has none
            event.record(torch.cuda.current_stream(self.device))
            self._events[turn] = event


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cut(
    memory: torch.Tensor, sizes: Sequence[int], like: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Lay tensors of the same shapes and dtypes one behind the other in a stretch of bytes."""
    starts = itertools.accumulate(sizes, initial=0)
    return [
        memory[start : start + tensor.numel() * tensor.itemsize]
        .view(tensor.dtype)
        .view(tensor.shape)
        for start, tensor in zip(starts, like, strict=False)
    ]
