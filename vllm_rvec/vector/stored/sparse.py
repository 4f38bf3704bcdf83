"""`sparse`: the elements that are not zero, and where they are."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_rvec.errors import VectorCorruptError
from vllm_rvec.vector.stored.compiled import compiled_loops, numbers
from vllm_rvec.vector.stored.tensor import Compact, StoredTensor, as_array, as_sides
from vllm_rvec.vector.stored.window import Window

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_rvec.vector.stored.team import Team
    from vllm_rvec.vector.stored.tensor import Array

__all__ = ["BitmapTensor", "GapsTensor"]

CHUNK_GAPS = 1 << 14
"""Values between two entries of the index by which a stretch finds its first value."""

CHUNK_WORDS = 1 << 12
"""Words of a bitmap, 64 elements each, between two entries of its index."""


class _SparseTensor(StoredTensor):
    """What both ways to store positions share: chunks, and an index of where they begin.

    The compiled loops of each are named for its kind.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], values: torch.Tensor, positions: Array
    ) -> None:
        self.shape = shape
        self.dtype = values.dtype
        self._name = name
        self._values = values
        self._positions = positions
        """Gaps, or words of a bitmap."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Put a stretch's values to their places among zeros."""
        out = torch.zeros(max(0, stop - start), dtype=self.dtype)
        first, last = self._chunks(start, stop)
        loops, values, sink = compiled_loops(), as_array(self._values), as_array(out)
        if last <= first:
            return out
        if loops is not None and values is not None and sink is not None:
            place, stretch = self._place_of(first, last), numbers(start, stop)
            getattr(loops, f"place_{self.kind}")(sink, self._positions, values, place, stretch)
            return out
        for chunk in range(first, last):  # one by one: decoded, positions take 8 bytes each
            low, high = (
                max(start, int(self._starts[chunk])),
                min(stop, int(self._starts[chunk + 1])),
            )
            tensors, decode = self.compact(low, high)
            out[low - start : high - start] = decode(tensors)
        return out

    def add(
        self, theta: torch.Tensor, out: torch.Tensor, origin: int, alpha: float, team: Team
    ) -> bool:
        """Write theta + alpha * v to a stretch."""
        window, loops = Window.of(theta, out, origin), compiled_loops()
        if window is None or not window.is_stretch or loops is None:
            return False
        sides, values = as_sides(theta, out, window), as_array(self._values)
        if sides is None or values is None:
            return False
        add, start = getattr(loops, f"add_{self.kind}"), window.start
        # Positions are looked up before threads share the work: while one does that, no other can.
        team.run(
            partial(
                add,
                *(side[first:last] for side in sides),
                self._positions,
                values,
                self._place_of(*self._chunks(start + first, start + last)),
                numbers(start + first, start + last),
                np.float32(alpha),
            )
            for first, last in team.shares(window.columns)
        )
        return True

    @cached_property
    @abstractmethod
    def _starts(self) -> Array:
        """The element at which each chunk begins, and one past the last chunk's last."""

    @abstractmethod
    def _place_of(self, first: int, last: int) -> tuple[Any, ...]:
        """Tell the compiled loops where the values of some chunks are, as these take it."""

    def _chunks(self, start: int, stop: int) -> tuple[int, int]:
        """Return the first chunk that has elements of a stretch, and one past the last."""
        starts = self._starts
        first = max(0, int(np.searchsorted(starts, start, side="right")) - 1)
        last = int(np.searchsorted(starts, stop, side="left"))
        return min(first, len(starts) - 1), min(last, len(starts) - 1)

    def _contradiction(self, why: str) -> VectorCorruptError:
        return VectorCorruptError(
            f"tensor {self._name!r} of the vector is damaged",
            why=why,
            fix="copy or download the whole folder again",
            tensor_name=self._name,
        )


class GapsTensor(_SparseTensor):
    """Values, each with the number of zeros before it.

    Args:
        name: The tensor's.
        shape: The tensor's.
        values: `[k]`.
        gaps: `[k]`, one or two bytes each.
    """

    kind = "gaps"

    def __init__(
        self, name: str, shape: tuple[int, ...], values: torch.Tensor, gaps: torch.Tensor
    ) -> None:
        super().__init__(name, shape, values, gaps.numpy())

    def compact(self, start: int, stop: int) -> Compact:
        """Give the values of a stretch, and their gaps."""
        (first, origin), (last, _) = self._seek(start), self._seek(stop)
        if last <= first:
            return _zeros(stop - start, self.dtype)
        gaps = self._positions[first:last]
        # PyTorch computes little with uint16; a bit mask makes the same numbers of int16.
        sent = torch.from_numpy(gaps.view(np.int16) if gaps.itemsize == 2 else gaps)
        decode = partial(_decode_gaps, before=origin - start, count=stop - start)
        return Compact((self._values[first:last], sent), decode)

    def _seek(self, element: int) -> tuple[int, int]:
        """Find the first value that is not before an element, and where its gap begins."""
        chunk = int(np.searchsorted(self._starts, element, side="right")) - 1
        chunk = max(0, min(chunk, len(self._starts) - 2))
        place = int(self._starts[chunk])
        first, last = self._values_of(chunk, chunk + 1)
        ends = place + np.cumsum(self._positions[first:last].astype(np.int64) + 1)
        count = int(np.searchsorted(ends, element, side="right"))
        return first + count, int(ends[count - 1]) if count else place

    @cached_property
    def _starts(self) -> Array:
        steps = np.zeros(-(-self._positions.size // CHUNK_GAPS), dtype=np.uintp)
        if loops := compiled_loops():
            loops.count_steps(self._positions, steps, *numbers(CHUNK_GAPS))
        else:
            for chunk in range(steps.size):
                gaps = self._positions[chunk * CHUNK_GAPS : (chunk + 1) * CHUNK_GAPS]
                steps[chunk] = gaps.sum(dtype=np.int64) + gaps.size
        starts = np.concatenate((np.zeros(1, np.uintp), np.cumsum(steps, dtype=np.uintp)))
        if starts[-1] > self.elements:
            raise self._contradiction("its gaps lead beyond its last element")
        return starts.astype(np.int64)

    def _place_of(self, first: int, last: int) -> tuple[Any, ...]:
        return numbers(*self._values_of(first, last), int(self._starts[first]))

    def _values_of(self, first: int, last: int) -> tuple[int, int]:
        return first * CHUNK_GAPS, min(last * CHUNK_GAPS, self._positions.size)


class BitmapTensor(_SparseTensor):
    """Values, and a bit for each element that says whether it has one.

    Args:
        name: The tensor's.
        shape: The tensor's.
        values: `[k]`.
        bitmap: Bytes, whole words of eight.
    """

    kind = "bitmap"

    def __init__(
        self, name: str, shape: tuple[int, ...], values: torch.Tensor, bitmap: torch.Tensor
    ) -> None:
        self._bytes = bitmap.numpy()
        # A file's tensors need not lie at multiples of eight.
        aligned = self._bytes if self._bytes.ctypes.data % 8 == 0 else self._bytes.copy()
        super().__init__(name, shape, values, aligned.view(np.uint64))

    def compact(self, start: int, stop: int) -> Compact:
        """Give the values of a stretch, and the bytes of the bitmap that have its bits."""
        if stop <= start or (first := self._seek(start)) == (last := self._seek(stop)):
            return _zeros(stop - start, self.dtype)
        whole = torch.from_numpy(self._bytes[start // 8 : -(-stop // 8)])
        decode = partial(_decode_bitmap, start=start % 8, count=stop - start)
        return Compact((self._values[first:last], whole), decode)

    def _seek(self, element: int) -> int:
        """Count the values before an element."""
        chunk = min(element // (CHUNK_WORDS * 64), len(self._starts) - 1)
        before = self._bits(chunk, chunk + 1)[: element - chunk * CHUNK_WORDS * 64]
        return int(self._first_values[chunk]) + int(np.count_nonzero(before))

    @cached_property
    def _starts(self) -> Array:
        self._first_values  # noqa: B018 - the check of the whole
        chunks = -(-self._positions.size // CHUNK_WORDS)
        starts = np.arange(chunks + 1, dtype=np.int64) * (CHUNK_WORDS * 64)
        starts[-1] = self.elements
        return starts

    @cached_property
    def _first_values(self) -> Array:
        """The number of each chunk's first value, and one past the last chunk's last."""
        counts = np.zeros(-(-self._positions.size // CHUNK_WORDS), dtype=np.uintp)
        if loops := compiled_loops():
            loops.count_bits(self._positions, counts, *numbers(CHUNK_WORDS))
        else:
            for chunk in range(counts.size):
                counts[chunk] = np.count_nonzero(self._bits(chunk, chunk + 1))
        found = np.concatenate((np.zeros(1, np.uintp), np.cumsum(counts, dtype=np.uintp)))
        self._check(int(found[-1]))
        return found.astype(np.int64)

    def _check(self, bits: int) -> None:
        last = self._bytes[self.elements // 8 :]
        beyond = np.unpackbits(last, bitorder="little")[self.elements % 8 :]
        if bits > self._values.numel() or beyond.any():
            raise self._contradiction("the bitmap has more bits than there are values or elements")
        if bits < self._values.numel():
            raise self._contradiction("the bitmap has fewer bits than there are values")

    def _place_of(self, first: int, _last: int) -> tuple[Any, ...]:
        return numbers(first * CHUNK_WORDS, int(self._first_values[first]))

    def _bits(self, first: int, last: int) -> np.ndarray:
        packed = self._bytes[first * CHUNK_WORDS * 8 : last * CHUNK_WORDS * 8]
        return np.unpackbits(packed, bitorder="little").view(bool)


def _zeros(count: int, dtype: torch.dtype) -> Compact:
    """Give a stretch without values: nothing is sent but a tensor that says where to decode."""
    count = max(0, count)
    return Compact((torch.empty(0, dtype=dtype),), lambda tensors: tensors[0].new_zeros(count))


def _decode_gaps(tensors: Sequence[torch.Tensor], *, before: int, count: int) -> torch.Tensor:
    """Put values behind their gaps; `before` is where the first gap begins."""
    values, gaps = tensors
    steps = gaps.to(torch.int64)
    if gaps.dtype == torch.int16:
        steps.bitwise_and_(0xFFFF)
    at = steps.add_(1).cumsum_(0).add_(before - 1)
    return values.new_zeros(count).index_copy_(0, at, values)


def _decode_bitmap(tensors: Sequence[torch.Tensor], *, start: int, count: int) -> torch.Tensor:
    """Put values to the bits that are set; `start` is the first byte's first bit that counts."""
    values, packed = tensors
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = packed.unsqueeze(1).bitwise_right_shift(shifts).bitwise_and_(1)
    mask = bits.view(torch.bool).view(-1)[start : start + count]
    return values.new_zeros(count).masked_scatter_(mask, values)
