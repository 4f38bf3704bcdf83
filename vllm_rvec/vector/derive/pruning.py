"""Two ways to thin out a task vector: keep the largest elements, or drop some at random.

Keeping the largest is the first step of TIES (arXiv:2306.01708); dropping at random and rescaling
the rest is DARE (arXiv:2311.03099).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["drop_randomly", "keep_largest"]

BLOCK_ELEMENTS: Final = 1 << 17
"""Elements worked on at a time. Even: two random numbers of 32 bits come from one of 64."""

DIGIT_BITS: Final = 16
DIGIT_VALUES: Final = 1 << DIGIT_BITS

DRAW_VALUES: Final = 1 << 32

Bits: TypeAlias = "npt.NDArray[np.unsignedinteger[Any]]"

UNSIGNED = {
    torch.float32: (torch.int32, np.uint32),
    torch.bfloat16: (torch.int16, np.uint16),
    torch.float16: (torch.int16, np.uint16),
}
"""Integers of a float's size: without the sign bit they are ordered as magnitudes are."""


def keep_largest(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Keep the elements of largest magnitude; the others become 0.

    Exactly `count` stay: of equal magnitudes at the threshold those with the lowest flat positions.
    Two or three passes in blocks find the threshold; memory is the result's.

    Args:
        tensor: Float32, bfloat16 or float16, finite.
        count: How many to keep, zeros included where there are not so many others.

    Returns:
        A new tensor of the same dtype and shape.

    >>> keep_largest(torch.tensor([1.0, -3.0, 2.0, 3.0, -2.0]), 3)
    tensor([ 0., -3.,  2.,  3.,  0.])
    """
    kept = tensor.clone(memory_format=torch.contiguous_format)
    if count >= kept.numel():
        return kept
    signed, unsigned = UNSIGNED[kept.dtype]
    bits = kept.view(-1).view(signed).numpy().view(unsigned)
    threshold, ties = _threshold(bits, count)
    for block, magnitude in _magnitudes(bits):
        is_dropped = magnitude < threshold
        tied = np.flatnonzero(magnitude == threshold)
        is_dropped[tied[ties:]] = True
        ties = max(0, ties - tied.size)
        block[is_dropped] = 0
    return kept


def drop_randomly(tensor: torch.Tensor, probability: float, raw: np.random.Philox) -> torch.Tensor:
    """Set each element to 0 with a probability, and multiply the rest by 1 / (1 - probability).

    Element i is dropped where the i-th 32-bit number of the stream (the lower half of each 64-bit
    number first) is below `probability * 2^32`: integers only, the same on every machine.

    Args:
        tensor: Float32, bfloat16 or float16.
        probability: In [0, 1).
        raw: The tensor's own generator.

    Returns:
        A new float32 tensor; each product is rounded once, of a factor that is rounded to float32.
    """
    limit = round(probability * DRAW_VALUES)
    factor = 1 / (1 - probability)
    out = torch.empty(tensor.shape, dtype=torch.float32)
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), BLOCK_ELEMENTS):
        block = flat[start : start + BLOCK_ELEMENTS].float()
        is_kept = torch.from_numpy(_draws(raw, block.numel()) >= limit)
        out.view(-1)[start : start + BLOCK_ELEMENTS] = torch.where(is_kept, block * factor, 0.0)
    return out


def _threshold(bits: Bits, count: int) -> tuple[int, int]:
    """Find the magnitude of rank `count` from the largest, digit by digit.

    Returns:
        The magnitude's bits, and how many elements of just that magnitude belong to the `count`.
    """
    prefix, left = 0, count
    for shift in range(bits.itemsize * 8 - DIGIT_BITS, -1, -DIGIT_BITS):
        is_first = shift + DIGIT_BITS == bits.itemsize * 8
        counts = np.zeros(DIGIT_VALUES, dtype=np.int64)
        for _, magnitude in _magnitudes(bits):
            same = slice(None) if is_first else magnitude >> (shift + DIGIT_BITS) == prefix
            digits = magnitude[same] >> shift & (DIGIT_VALUES - 1)
            counts += np.bincount(digits, minlength=DIGIT_VALUES)
        from_largest = np.cumsum(counts[::-1])
        place = int(np.searchsorted(from_largest, left))
        left -= int(from_largest[place - 1]) if place else 0
        prefix = prefix << DIGIT_BITS | (DIGIT_VALUES - 1 - place)
    return prefix, left


def _magnitudes(bits: Bits) -> Iterator[tuple[Bits, Bits]]:
    """Give blocks of the bits as they are and, newly made, without their sign."""
    without_sign = (1 << (bits.itemsize * 8 - 1)) - 1
    for start in range(0, bits.size, BLOCK_ELEMENTS):
        block = bits[start : start + BLOCK_ELEMENTS]
        yield block, block & bits.dtype.type(without_sign)


def _draws(raw: np.random.Philox, count: int) -> npt.NDArray[np.uint32]:
    wide = np.asarray(raw.random_raw(-(-count // 2)), dtype="<u8")
    draws: npt.NDArray[np.uint32] = wide.view("<u4")[:count]
    return draws
