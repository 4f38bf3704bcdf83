"""Memory that is used for one block after another.

A block's buffers are too large for the allocator's cache: making them anew for each block takes
longer than computing it, most of it in page faults.
"""

from __future__ import annotations

import math
import threading

import torch

__all__ = ["Scratch"]


class Scratch(threading.local):
    """Buffers by name, each thread's own; good until the next `take` of the same name."""

    def __init__(self) -> None:
        self._views: dict[tuple[str, tuple[int, ...], torch.dtype], torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor of that shape and dtype; what is in it is anything."""
        key = name, shape, dtype
        if (view := self._views.get(key)) is None:
            view = self._views[key] = self._buffer(name, math.prod(shape), dtype).view(shape)
        return view

    def copy(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor's values in a dtype, in the buffer of that name."""
        return self.take(name, tensor.shape, dtype).copy_(tensor)

    def _buffer(self, name: str, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a flat piece of the largest buffer of that name, or of a new one."""
        views = [view for (n, _, d), view in self._views.items() if (n, d) == (name, dtype)]
        largest = max(views, key=torch.Tensor.numel, default=None)
        if largest is None or largest.numel() < elements:
            self._views = {k: v for k, v in self._views.items() if (k[0], k[2]) != (name, dtype)}
            return torch.empty(elements, dtype=dtype)
        return largest.view(-1)[:elements]
