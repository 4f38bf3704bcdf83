"""`sparse`: the elements that are not zero, and where they are. Lossless."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_rvec.checkpoint.dtypes import TORCH_DTYPES
from vllm_rvec.errors import VectorCorruptError
from vllm_rvec.vector.encodings.parts import Part, in_memory, size_bytes
from vllm_rvec.vector.layout import BITMAP, GAPS, VALUES, bitmap_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_rvec.vector.encodings.source import Source
    from vllm_rvec.vector.manifest import TensorEntry

__all__ = ["decode_sparse", "encode_sparse", "may_be_sparse"]

GAP_DENSITY = 1 / 8
"""Above it a bitmap (one bit an element) is never larger than gaps (one byte a value)."""

DECODED_ELEMENTS = 1 << 20
"""Elements or values decoded at a time: what decoding takes beside the tensor itself."""


def may_be_sparse(elements: int, stored: int, dtype: torch.dtype) -> bool:
    """Tell whether sparse parts can be smaller than the dense tensor, before they are made."""
    positions = min(bitmap_bytes(elements), stored)
    return positions + stored * dtype.itemsize < elements * dtype.itemsize


def encode_sparse(source: Source, dtype: torch.dtype, stored: int) -> tuple[Part, ...]:
    """Gather what is not zero, with the positions that take the least room.

    Args:
        source: The tensor.
        dtype: What values are rounded to.
        stored: How many of its elements are not zero then.
    """
    if stored > source.elements * GAP_DENSITY:
        return _bitmap_parts(source, dtype)
    positions, values = _positions(source, dtype)
    as_gaps = [_gap_parts(positions, values, limit) for limit in (0xFF, 0xFFFF)]
    best = min(as_gaps, key=size_bytes)
    limit = bitmap_bytes(source.elements) + values.numel() * dtype.itemsize
    return best if size_bytes(best) < limit else _bitmap_parts(source, dtype)


def _bitmap_parts(source: Source, dtype: torch.dtype) -> tuple[Part, ...]:
    values, packed, rest = [], [], np.zeros(0, dtype=bool)
    for block in source.blocks():
        flat = block.reshape(-1).to(dtype)
        mask = flat != 0
        values.append(flat[mask])
        bits = np.concatenate((rest, mask.numpy()))
        whole = bits.size // 8 * 8
        packed.append(np.packbits(bits[:whole], bitorder="little"))
        rest = bits[whole:]
    packed.append(np.packbits(rest, bitorder="little"))
    bitmap = torch.zeros(bitmap_bytes(source.elements), dtype=torch.uint8)
    joined = np.concatenate(packed)
    bitmap[: joined.size] = torch.from_numpy(joined)
    return in_memory(VALUES, torch.cat(values)), in_memory(BITMAP, bitmap)


def _positions(source: Source, dtype: torch.dtype) -> tuple[np.ndarray, torch.Tensor]:
    positions, values, start = [], [], 0
    for block in source.blocks():
        flat = block.reshape(-1).to(dtype)
        found = torch.nonzero(flat).squeeze(1)
        values.append(flat[found])
        positions.append(found.numpy() + start)
        start += flat.numel()
    return np.concatenate(positions), torch.cat(values)


def _gap_parts(positions: np.ndarray, values: torch.Tensor, limit: int) -> tuple[Part, ...]:
    gaps = np.diff(positions, prepend=-1) - 1
    bridges = gaps // (limit + 1)
    last = np.cumsum(bridges + 1) - 1
    total = int(last[-1]) + 1
    all_gaps = np.full(total, limit, dtype=np.uint8 if limit == 0xFF else np.uint16)
    all_gaps[last] = gaps - bridges * (limit + 1)
    all_values = torch.zeros(total, dtype=values.dtype)
    all_values[torch.from_numpy(last)] = values
    return in_memory(VALUES, all_values), in_memory(GAPS, torch.from_numpy(all_gaps))


def decode_sparse(entry: TensorEntry, name: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Put values back to their places; raises VectorCorruptError where they have none."""
    values = parts[name + VALUES]
    out = torch.zeros(entry.elements, dtype=TORCH_DTYPES[entry.dtype])
    if name + BITMAP in parts:
        problem = _fill_by_bitmap(out, values, parts[name + BITMAP].numpy())
    else:
        problem = _fill_by_gaps(out, values, parts[name + GAPS])
    if problem:
        raise _contradiction(name, problem)
    return out.view(entry.shape)


def _fill_by_bitmap(out: torch.Tensor, values: torch.Tensor, bitmap: np.ndarray) -> str:
    """Put values where bits are set, a block at a time; return what is wrong, if anything."""
    done = 0
    for first in range(0, out.numel(), DECODED_ELEMENTS):
        block = out[first : first + DECODED_ELEMENTS]
        packed = bitmap[first // 8 : (first + DECODED_ELEMENTS) // 8]
        bits = np.unpackbits(packed, bitorder="little").view(bool)
        count = int(np.count_nonzero(bits))
        if done + count > values.numel() or bits[block.numel() :].any():
            return "the bitmap has more bits than there are values or elements"
        mask = torch.from_numpy(bits[: block.numel()])
        block.masked_scatter_(mask, values[done : done + count])
        done += count
    return "" if done == values.numel() else "the bitmap has fewer bits than there are values"


def _fill_by_gaps(out: torch.Tensor, values: torch.Tensor, gaps: torch.Tensor) -> str:
    """Put values behind their gaps, a block at a time; return what is wrong, if anything."""
    last = -1
    for first in range(0, gaps.numel(), DECODED_ELEMENTS):
        steps = gaps[first : first + DECODED_ELEMENTS].to(torch.int64) + 1
        positions = torch.cumsum(steps, 0) + last
        last = int(positions[-1])
        if last >= out.numel():
            return "its gaps lead beyond its last element"
        out[positions] = values[first : first + DECODED_ELEMENTS]
    return ""


def _contradiction(name: str, why: str) -> VectorCorruptError:
    return VectorCorruptError(
        f"tensor {name!r} of the vector is damaged",
        why=why,
        fix="copy or download the whole folder again",
        tensor_name=name,
    )
