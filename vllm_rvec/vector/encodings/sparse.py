"""`sparse`: the elements that are not zero, and where they are. Lossless."""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_rvec.vector.encodings.parts import Part, size_bytes
from vllm_rvec.vector.encodings.source import Rounded
from vllm_rvec.vector.layout import BITMAP, GAPS, VALUES, bitmap_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from vllm_rvec.vector.encodings.source import Source

__all__ = ["encode_sparse", "may_be_sparse"]

Integers = npt.NDArray[Any]
"""The bits of floats, bytes, or gaps."""

GAP_DENSITY = 1 / 8
"""Above it a bitmap (one bit an element) is never larger than gaps (one byte a value)."""

NARROW_GAP, WIDE_GAP = 0xFF, 0xFFFF
"""The widest gaps that one and two bytes hold."""


def may_be_sparse(elements: int, stored: int, dtype: torch.dtype) -> bool:
    """Tell whether sparse parts can be smaller than the dense tensor, before they are made."""
    positions = min(bitmap_bytes(elements), stored)
    return positions + stored * dtype.itemsize < elements * dtype.itemsize


def encode_sparse(source: Source, dtype: torch.dtype, stored: int) -> tuple[Part, Part]:
    """Gather what is not zero, with the positions that take the least room.

    The values are computed as they are written; only their positions are kept meanwhile.

    Args:
        source: The tensor.
        dtype: What values are rounded to.
        stored: How many of its elements are not zero then.

    Returns:
        The values, and the bitmap or the gaps.
    """
    bitmap = _Bitmap(source, dtype, stored)
    if stored > source.elements * GAP_DENSITY:
        return bitmap.parts()
    bridges = _count_bridges(source, dtype)
    candidates = [bitmap, *(_Gaps(source, dtype, stored + n, limit) for limit, n in bridges)]
    return min((candidate.parts() for candidate in candidates), key=size_bytes)


class _Packed:
    """One pass over a source: what is not zero, and the positions of that."""

    def __init__(self, source: Source, dtype: torch.dtype, count: int) -> None:
        self.source, self.dtype, self.count = source, dtype, count
        self._packed: list[Integers] | None = None

    def parts(self) -> tuple[Part, Part]:
        """Return both parts; the second is known once the first has been read."""
        values = Part(VALUES, self.dtype, (self.count,), _Again(self._values))
        return values, self._positions_part(_Again(self._positions))

    def _values(self) -> Iterator[torch.Tensor]:
        self._packed = []
        for values in self._pack(self._packed):
            yield torch.from_numpy(values).view(self.dtype)

    def _positions(self) -> Iterator[torch.Tensor]:
        if self._packed is None:
            deque(self._values(), maxlen=0)
        return (torch.from_numpy(packed) for packed in self._packed or ())

    def _positions_part(self, blocks: Iterable[torch.Tensor]) -> Part:
        raise NotImplementedError

    def _pack(self, positions: list[Integers]) -> Iterator[Integers]:
        """Give the values' bits block by block, and append their packed positions."""
        raise NotImplementedError


class _Bitmap(_Packed):
    def _positions_part(self, blocks: Iterable[torch.Tensor]) -> Part:
        return Part(BITMAP, torch.uint8, (bitmap_bytes(self.source.elements),), blocks)

    def _pack(self, positions: list[Integers]) -> Iterator[Integers]:
        rest = np.zeros(0, dtype=bool)
        for bits, mask in _masked(self.source, self.dtype):
            joined = np.concatenate((rest, mask))
            whole = joined.size // 8 * 8
            positions.append(np.packbits(joined[:whole], bitorder="little"))
            rest = joined[whole:]
            yield bits[mask]
        packed = sum(block.size for block in positions)
        last = np.zeros(bitmap_bytes(self.source.elements) - packed, dtype=np.uint8)
        last[: math.ceil(rest.size / 8)] = np.packbits(rest, bitorder="little")
        positions.append(last)


class _Gaps(_Packed):
    def __init__(self, source: Source, dtype: torch.dtype, count: int, limit: int) -> None:
        super().__init__(source, dtype, count)
        self.limit = limit
        self._gap_dtype = np.uint8 if limit == NARROW_GAP else np.uint16

    def _positions_part(self, blocks: Iterable[torch.Tensor]) -> Part:
        dtype = torch.uint8 if self.limit == NARROW_GAP else torch.uint16
        return Part(GAPS, dtype, (self.count,), blocks)

    def _pack(self, positions: list[Integers]) -> Iterator[Integers]:
        for bits, mask, gaps in _with_gaps(self.source, self.dtype):
            bridges = gaps // (self.limit + 1)
            ends = np.cumsum(bridges + 1) - 1
            count = int(ends[-1]) + 1 if ends.size else 0
            packed = np.full(count, self.limit, dtype=self._gap_dtype)
            packed[ends] = gaps - bridges * (self.limit + 1)
            positions.append(packed)
            values = np.zeros(count, dtype=bits.dtype)
            values[ends] = bits[mask]
            yield values


class _Again:
    """What a function gives, each time that it is iterated over."""

    def __init__(self, make: Callable[[], Iterator[torch.Tensor]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self._make()


def _masked(source: Source, dtype: torch.dtype) -> Iterator[tuple[Integers, npt.NDArray[np.bool_]]]:
    """Give the bits of a source's elements in a dtype, and which are not zero, block by block."""
    as_bits = torch.int32 if dtype == torch.float32 else torch.int16
    for block in Rounded(source, dtype):
        bits = block.reshape(-1).view(as_bits).numpy()
        # Without its sign: -0.0 is zero too.
        yield bits, np.not_equal(bits & np.iinfo(bits.dtype).max, 0)


def _with_gaps(
    source: Source, dtype: torch.dtype
) -> Iterator[tuple[Integers, npt.NDArray[np.bool_], npt.NDArray[np.int64]]]:
    """Give bits and mask as `_masked`, and how many zeros are before each value."""
    start, last = 0, -1
    for bits, mask in _masked(source, dtype):
        positions = np.flatnonzero(mask) + start
        yield bits, mask, np.diff(positions, prepend=last) - 1
        start += bits.size
        last = int(positions[-1]) if positions.size else last


def _count_bridges(source: Source, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Count the values that only bridge a gap, for each width of gaps."""
    counts = Counter[int]()
    for _, _, gaps in _with_gaps(source, dtype):
        for limit in (NARROW_GAP, WIDE_GAP):
            counts[limit] += int((gaps // (limit + 1)).sum())
    return [(limit, counts[limit]) for limit in (NARROW_GAP, WIDE_GAP)]
