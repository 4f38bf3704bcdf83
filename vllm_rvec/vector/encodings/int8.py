"""`int8`: one byte an element and a scale for each output row. Lossy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from vllm_rvec.vector.encodings.parts import Encoded, in_memory
from vllm_rvec.vector.encodings.source import norm_of, row_blocks
from vllm_rvec.vector.layout import INT8, SCALE

if TYPE_CHECKING:
    from vllm_rvec.vector.encodings.source import Source

__all__ = ["encode_int8", "round_rows"]


def encode_int8(source: Source) -> Encoded:
    """Round every row to 255 steps of its largest element."""
    scales, rounded = [], torch.empty(source.shape, dtype=torch.int8)
    squared_norm = squared_error = 0.0
    for out, block in zip(row_blocks(rounded), source.blocks(), strict=True):
        codes, scale = round_rows(block)
        out.copy_(codes)
        back = out.float() * scale.unsqueeze(1)
        squared_norm += norm_of(back) ** 2
        squared_error += norm_of(block - back) ** 2
        scales.append(scale)
    parts = in_memory(SCALE, torch.cat(scales)), in_memory(INT8, rounded)
    return Encoded("int8", "F32", parts, squared_norm=squared_norm, squared_error=squared_error)


def round_rows(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows to 255 steps of their largest elements.

    Args:
        block: float32 [rows, columns].

    Returns:
        Whole numbers from -127 to 127, still float32 [rows, columns], and float32 scales [rows].
    """
    scale = _row_scales(block)
    # A row of zeros has a scale of zero.
    factor = torch.where(scale > 0, scale, torch.ones_like(scale)).unsqueeze(1)
    return (block / factor).round_().clamp_(-127, 127), scale


def _row_scales(block: torch.Tensor) -> torch.Tensor:
    """Return what one step is worth: a 127th of each row's largest element."""
    largest = block.abs().amax(dim=1)
    scale = largest / 127
    # A 127th may be too small, by much where float32 is subnormal, or too large by a rounding that
    # takes 127 of it beyond the range.
    scale = torch.where(scale * 127 < largest, scale.nextafter(torch.tensor(math.inf)), scale)
    return torch.where(torch.isinf(scale * 127), scale.nextafter(torch.tensor(0.0)), scale)
