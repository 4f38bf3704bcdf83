"""`lowrank`: a matrix as the product of two factors, as LoRA has them. Lossy, unless imported."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from vllm_rvec.vector.encodings.parts import Encoded, in_memory
from vllm_rvec.vector.encodings.source import norm_of
from vllm_rvec.vector.layout import LORA_A, LORA_B

if TYPE_CHECKING:
    from vllm_rvec.vector.encodings.source import Source

__all__ = ["encode_lowrank", "is_worth_factors", "product", "product_rows", "top_singular"]

OVERSAMPLING = 8
POWER_ITERATIONS = 4
"""Of the randomized SVD (Halko, Martinsson, Tropp, arXiv:0909.4061)."""
EXACT_SVD_SIZE = 512
"""Up to this many rows or columns the exact SVD is as fast."""

PRODUCT_ELEMENTS = 1 << 20
"""Elements of a product that are in memory in float64 at a time."""


def is_worth_factors(shape: tuple[int, ...], rank: int) -> bool:
    """Tell whether two factors have fewer numbers than the matrix."""
    return len(shape) == 2 and rank * sum(shape) < math.prod(shape)


def encode_lowrank(source: Source, rank: int, dtype: torch.dtype) -> Encoded:
    """Factor a matrix by its largest singular values; the factors are rounded to `dtype`."""
    matrix = source.whole()
    left, values, right = top_singular(matrix, rank)
    root = values.sqrt()
    lora_a = (root.unsqueeze(1) * right).to(dtype).contiguous()
    lora_b = (left * root).to(dtype).contiguous()
    back = product(lora_a, lora_b, 1.0)
    return Encoded(
        "lowrank",
        "F32",
        (in_memory(LORA_A, lora_a), in_memory(LORA_B, lora_b)),
        scaling=1.0,
        squared_norm=norm_of(back) ** 2,
        squared_error=norm_of(matrix.sub_(back)) ** 2,
    )


def top_singular(
    matrix: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the largest singular values of a matrix and their vectors.

    Exact for small matrices, else by a randomized method with a fixed seed.

    Args:
        matrix: Float32 `[out, in]`.
        rank: How many.

    Returns:
        `[out, rank]`, `[rank]` in falling order, `[rank, in]`.
    """
    if min(matrix.shape) <= EXACT_SVD_SIZE:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(
            matrix, min(rank + OVERSAMPLING, *matrix.shape), niter=POWER_ITERATIONS
        )
    return left[:, :rank], values[:rank], right[:, :rank].T


def product(lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Multiply factors in float64, rounded once to float32, a block of rows at a time."""
    wide_a = lora_a.double()
    out = torch.empty(lora_b.shape[0], lora_a.shape[1], dtype=torch.float32)
    rows = product_rows(lora_a)
    for target, block in zip(torch.split(out, rows), torch.split(lora_b, rows), strict=True):
        target.copy_((block.double() @ wide_a).mul_(scaling))
    return out


def product_rows(lora_a: torch.Tensor) -> int:
    """Return how many rows of a product are computed at a time."""
    return max(1, PRODUCT_ELEMENTS // max(1, lora_a.shape[1]))
