"""Frobenius norms and products of whole tensors, in float64 block by block."""

from __future__ import annotations

import math

import torch

from vllm_rvec.vector.encodings.source import row_blocks

__all__ = ["frobenius", "scaled"]


def frobenius(tensor: torch.Tensor) -> float:
    """Compute a tensor's Frobenius norm; squares and their sum are in float64.

    >>> frobenius(torch.tensor([3.0, 4.0]))
    5.0
    """
    norms = (torch.linalg.vector_norm(block, dtype=torch.float64) for block in row_blocks(tensor))
    return math.sqrt(sum(float(norm) ** 2 for norm in norms))


def scaled(tensor: torch.Tensor, factor: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Multiply a tensor: the product in float64, rounded to float32, then to `dtype`.

    For a factor that float32 holds this is the float32 product: of 24 times 24 bits float64 loses
    nothing.
    """
    out = torch.empty(tensor.shape, dtype=dtype)
    for target, block in zip(row_blocks(out), row_blocks(tensor), strict=True):
        target.copy_(block.double().mul_(factor).float())
    return out
