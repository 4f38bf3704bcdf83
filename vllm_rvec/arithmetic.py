"""The one formula: v = tuned - base, and fused = theta + alpha * v, with their numerics.

Source: task arithmetic (arXiv:2212.04089) and reasoning vectors (arXiv:2509.01363).

The reference, which every path of this package reproduces bit for bit:

    fused = (theta.float() + float32(alpha) * v.float()).to(out.dtype)

that is: alpha in float32, the product rounded to float32, the sum rounded to float32, and one
rounding to the result's dtype. alpha 0 is theta itself, every bit of it (0 * inf is nan, and
-0.0 + 0.0 loses a sign, so the formula is not evaluated at all).

Several vectors are added in the order given, and rounded to the result's dtype once:

    fused = (((theta.float() + a1 * v1) + a2 * v2) + ...).to(out.dtype)

each product and each sum rounded to float32, terms whose alpha is 0 left out. Sums of floats depend
on their order: v2, v1 may differ from v1, v2 in the last bit.

Not here: where tensors come from or go to.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "BLOCK_ELEMENTS",
    "FLOAT_DTYPES",
    "difference",
    "fuse",
    "fuse_all",
    "is_finite",
    "single_threaded_kernels",
]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that the formula is defined for."""

_ONES = {dtype: torch.ones((), dtype=dtype) for dtype in FLOAT_DTYPES}

BLOCK_ELEMENTS = 1 << 17
"""Elements converted to float32 at a time: two buffers of 512 KiB stay in a core's L2 cache."""


def difference(
    tuned: torch.Tensor, base: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute v = tuned - base in float32.

    Args:
        tuned: The tuned donor's tensor, any shape, one of `FLOAT_DTYPES`.
        base: The base donor's tensor, same shape, one of `FLOAT_DTYPES`.
        out: A float32 tensor of that shape to write to; a new one where None. May be an input.

    Returns:
        The float32 difference.

    >>> difference(torch.tensor([1.5]), torch.tensor([1.0]))
    tensor([0.5000])
    """
    return torch.sub(tuned.float(), base.float(), out=out)


def fuse(
    theta: torch.Tensor, vector: torch.Tensor, alpha: float, *, out: torch.Tensor
) -> torch.Tensor:
    """Write theta + alpha * vector into `out`, rounded once to its dtype.

    Reads theta and vector once and writes out once. Where all three have one dtype this is a
    single kernel: `torch.addcmul` with a factor of one computes the reference exactly, for every
    alpha, while `torch.add(..., alpha=a)` rounds alpha to the tensors' dtype first. Otherwise
    blocks of rows go through float32.

    Args:
        theta: The target's tensor, any shape and strides, one of `FLOAT_DTYPES`, on the CPU.
        vector: The task vector's tensor, same shape, one of `FLOAT_DTYPES`, on the CPU.
        alpha: The scaling coefficient; rounded to float32.
        out: Same shape, one of `FLOAT_DTYPES`, on the CPU. May not overlap the inputs.

    Returns:
        `out`.

    >>> t = torch.tensor([1.0, 2.0])
    >>> fuse(t, torch.tensor([0.5, -1.0]), 0.5, out=torch.empty(2))
    tensor([1.2500, 1.5000])
    """
    if alpha == 0:
        return out.copy_(theta)
    if theta.dtype == vector.dtype == out.dtype:
        return torch.addcmul(theta, vector, _ONES[theta.dtype], value=alpha, out=out)
    if theta.dim() == 0:
        return out.copy_(_fused_in_float32(theta, vector, alpha))
    rows = max(1, BLOCK_ELEMENTS // max(1, theta[:1].numel()))
    blocks = zip(*(torch.split(side, rows) for side in (theta, vector, out)), strict=True)
    for theta_block, vector_block, out_block in blocks:
        out_block.copy_(_fused_in_float32(theta_block, vector_block, alpha))
    return out


def fuse_all(
    theta: torch.Tensor, terms: Sequence[tuple[torch.Tensor, float]], *, out: torch.Tensor
) -> torch.Tensor:
    """Write theta + the sum of alpha * vector into `out`, rounded once to its dtype.

    With one term this is `fuse`; without terms, or with none whose alpha is not 0, theta itself.

    Args:
        theta: The target's tensor, any shape and strides, one of `FLOAT_DTYPES`, on the CPU.
        terms: Vectors, each as `fuse` takes it, with their alphas, in the order of adding.
        out: Same shape, one of `FLOAT_DTYPES`, on the CPU. May not overlap the inputs.

    Returns:
        `out`.

    >>> terms = [(torch.tensor([0.5, -1.0]), 0.5), (torch.tensor([4.0, 4.0]), 2.0)]
    >>> fuse_all(torch.tensor([1.0, 2.0]), terms, out=torch.empty(2))
    tensor([9.2500, 9.5000])
    """
    added = [(vector, alpha) for vector, alpha in terms if alpha != 0]
    if len(added) == 1:
        return fuse(theta, *added[0], out=out)
    if not added:
        return out.copy_(theta)
    if theta.dim() == 0:
        return out.copy_(_summed_in_float32(theta, added))
    rows = max(1, BLOCK_ELEMENTS // max(1, theta[:1].numel()))
    vectors = [torch.split(vector, rows) for vector, _ in added]
    alphas = [alpha for _, alpha in added]
    blocks = zip(*(torch.split(side, rows) for side in (theta, out)), *vectors, strict=True)
    for theta_block, out_block, *parts in blocks:
        terms_block = list(zip(parts, alphas, strict=True))
        out_block.copy_(_summed_in_float32(theta_block, terms_block))
    return out


@contextmanager
def single_threaded_kernels() -> Iterator[None]:
    """Have PyTorch run each kernel on one thread while the block runs.

    For passes that use the cores by threads of their own, block by block: kernels of a block are
    so short that waiting for each other costs more than sharing the work gains.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_finite(tensor: torch.Tensor) -> bool:
    """Tell whether every element is finite, reading the tensor once.

    A sum is finite only if all its terms are, and is many times as fast as looking at each. Where
    it is not (a term, or an overflow of the sum) each element is looked at.

    >>> is_finite(torch.tensor([1.0, float("nan")]))
    False
    """
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def _fused_in_float32(theta: torch.Tensor, vector: torch.Tensor, alpha: float) -> torch.Tensor:
    return torch.addcmul(theta.float(), vector.float(), _ONES[torch.float32], value=alpha)


def _summed_in_float32(
    theta: torch.Tensor, terms: Sequence[tuple[torch.Tensor, float]]
) -> torch.Tensor:
    (vector, alpha), *rest = terms
    total = _fused_in_float32(theta, vector, alpha)
    for vector, alpha in rest:
        torch.addcmul(total, vector.float(), _ONES[torch.float32], value=alpha, out=total)
    return total
