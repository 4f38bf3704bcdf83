"""A tensor that is read in blocks, and what one pass over it tells."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_rvec.arithmetic import BLOCK_ELEMENTS
from vllm_rvec.vector.scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Measures", "Rounded", "Source", "measure", "norm_of", "row_blocks"]

SMALL_NORM = 1e-12
"""Below it squares of float32 numbers may have vanished."""


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor that can be read in blocks of rows, any number of times."""

    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[torch.Tensor]]
    """Gives float32 blocks `[rows, last dimension]` in order, whole rows each. A block is good
    until the next one is asked for."""

    @property
    def elements(self) -> int:
        """How many elements the tensor has."""
        return math.prod(self.shape)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Source:
        """Read a tensor that is in memory."""
        return cls(tuple(tensor.shape), lambda: (block.float() for block in row_blocks(tensor)))

    def whole(self) -> torch.Tensor:
        """Return the tensor as one, in float32."""
        out = torch.empty(self.shape, dtype=torch.float32)
        for target, block in zip(row_blocks(out), self.blocks(), strict=True):
            target.copy_(block)
        return out


def row_blocks(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cut a tensor into views `[rows, last dimension]` of about `BLOCK_ELEMENTS` elements."""
    if tensor.numel() == 0:
        return ()
    rows = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    return torch.split(rows, max(1, BLOCK_ELEMENTS // rows.shape[1]))


class Rounded:
    """A source's blocks in another dtype; may be iterated over more than once."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self._source, self._dtype = source, dtype

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self._dtype == torch.float32:
            return self._source.blocks()
        scratch = Scratch()
        return (scratch.copy("rounded", block, self._dtype) for block in self._source.blocks())


@dataclass(slots=True)
class Measures:
    """What one pass over a source tells."""

    changed: int = 0
    """Elements of the source that are not zero."""
    stored: int = 0
    """Elements that are not zero once rounded to the chosen dtype."""
    squared_norm: float = 0.0
    """Of the source."""
    squared_stored_norm: float = 0.0
    """Of the source, rounded."""
    squared_error: float = 0.0
    """Of rounding it."""
    is_finite: bool = True
    """Whether all of it is, once rounded."""
    narrow: torch.dtype | None = torch.bfloat16
    """A narrower dtype that holds every rounded element exactly, or None."""
    scratch: Scratch = field(default_factory=Scratch, repr=False)
    """For what is computed of a block."""

    def add(self, block: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Take one float32 block into account.

        Returns:
            What a reader will get for it: the block rounded to `dtype`, in float32.
        """
        norm, count = norm_of(block), self._count_nonzero(block)
        self.changed += count
        self.squared_norm += norm**2
        back = block
        if dtype != torch.float32:
            self.narrow = None
            back = self._rounded(block, dtype)
            norm, count = norm_of(back), self._count_nonzero(back)
            lost = self.scratch.take("lost", block.shape, torch.float32)
            self.squared_error += norm_of(torch.sub(block, back, out=lost)) ** 2
        self.stored += count
        self.squared_stored_norm += norm**2
        # A norm is finite only if every element is; it may overflow though they all are.
        if not math.isfinite(norm):
            self.is_finite &= bool(torch.isfinite(back).all())
        if self.narrow is not None and self._differ(self._rounded(block, self.narrow), block):
            self.narrow = None
        return back

    def _rounded(self, block: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rounded = self.scratch.copy("rounded", block, dtype)
        return self.scratch.copy("back", rounded, torch.float32)

    # By numpy and into a mask: many times as fast as torch.count_nonzero and torch.equal.

    def _count_nonzero(self, block: torch.Tensor) -> int:
        mask = self.scratch.take("mask", block.shape, torch.bool).numpy()
        return int(np.count_nonzero(np.not_equal(block.numpy(), 0, out=mask)))

    def _differ(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        mask = self.scratch.take("mask", one.shape, torch.bool).numpy()
        return bool(np.count_nonzero(np.not_equal(one.numpy(), other.numpy(), out=mask)))


def measure(source: Source, dtype: torch.dtype) -> Measures:
    """Read a source once, rounding it to a dtype."""
    measures = Measures()
    for block in source.blocks():
        measures.add(block, dtype)
    return measures


def norm_of(block: torch.Tensor) -> float:
    """Compute a tensor's Frobenius norm, in float64 where float32 is too small for its squares."""
    norm = float(torch.linalg.vector_norm(block))
    if norm < SMALL_NORM or not math.isfinite(norm):
        norm = float(torch.linalg.vector_norm(block, dtype=torch.float64))
    return norm
