"""A stored tensor with rows behind its own that add nothing."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from vllm_rvec.vector.stored.tensor import Compact, StoredTensor

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PaddedTensor"]


class PaddedTensor(StoredTensor):
    """The same elements, and then zeros: where a target has more rows than the vector.

    Args:
        stored: The tensor.
        shape: With padding, or with fewer rows: then what is behind them is not there.
        zero: 0.0 or -0.0. With the sign that makes its product with alpha -0.0, the sum leaves
            every bit of a weight as it is.
    """

    def __init__(self, stored: StoredTensor, shape: tuple[int, ...], zero: float) -> None:
        self.kind = stored.kind
        self.shape = shape
        self.dtype = stored.dtype
        self.check = stored.check
        self._stored = stored
        self._zero = zero

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Decode a stretch, and pad it where it goes beyond the tensor."""
        end = min(stop, self._stored.elements)
        if stop <= end:
            return self._stored.read(start, stop)
        padding = torch.full((stop - max(start, end),), self._zero, dtype=self.dtype)
        return torch.cat((self._stored.read(start, end), padding)) if start < end else padding

    def compact(self, start: int, stop: int) -> Compact:
        """Give the tensor's own part of a stretch; the padding is made where it is decoded."""
        end = max(start, min(stop, self._stored.elements))
        own = self._stored.compact(start, end)
        return Compact(own.tensors, partial(self._decode, own=own, padding=max(stop, start) - end))

    def _decode(
        self, tensors: Sequence[torch.Tensor], *, own: Compact, padding: int
    ) -> torch.Tensor:
        values = own.decode(tensors)
        return torch.cat((values, values.new_full((padding,), self._zero))) if padding else values
