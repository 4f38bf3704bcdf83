"""`lowrank`: a matrix as the product of two factors."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch

from vllm_rvec.vector.encodings.lowrank import product, product_rows
from vllm_rvec.vector.stored.tensor import StoredTensor

if TYPE_CHECKING:
    from vllm_rvec.vector.manifest import TensorEntry

__all__ = ["LowRankTensor"]


class LowRankTensor(StoredTensor):
    """scaling * (B @ A), computed in the blocks of rows that `product` computes.

    How a matrix is cut decides about the last bit of a few of its elements, so that it is cut in
    one way, whatever stretch is asked for. The last block is kept: the next stretch is often in it.

    Args:
        entry: The manifest's.
        lora_a: `[R, in]`.
        lora_b: `[out, R]`.
    """

    kind = "lowrank"
    dtype = torch.float32

    def __init__(self, entry: TensorEntry, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        self.shape = entry.shape
        self._factors = lora_a, lora_b
        self._scaling = entry.scaling or 0.0
        self._rows = product_rows(lora_a)
        self._kept = threading.local()

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Multiply the blocks of rows that a stretch is in."""
        size = self._rows * self.shape[1]
        if stop <= start or size == 0:
            return torch.empty(0, dtype=torch.float32)
        blocks = range(start // size, -(-stop // size))
        parts = [
            self._block(block)[max(0, start - block * size) : stop - block * size]
            for block in blocks
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _block(self, number: int) -> torch.Tensor:
        if getattr(self._kept, "number", None) != number:
            lora_a, lora_b = self._factors
            rows = lora_b[number * self._rows : (number + 1) * self._rows]
            self._kept.block = product(lora_a, rows, self._scaling).view(-1)
            self._kept.number = number
        block: torch.Tensor = self._kept.block
        return block
