"""`sparse`: the elements that are not zero, and where they are."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_rvec.checkpoint.dtypes import TORCH_DTYPES
from vllm_rvec.errors import VectorCorruptError
from vllm_rvec.vector.stored.compiled import compiled_loops, numbers
from vllm_rvec.vector.stored.tensor import StoredTensor, as_array, as_row
from vllm_rvec.vector.stored.window import Window

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_rvec.vector.manifest import TensorEntry
    from vllm_rvec.vector.stored.team import Team
    from vllm_rvec.vector.stored.tensor import Array

__all__ = ["BitmapTensor", "GapsTensor"]

CHUNK_GAPS = 1 << 14
"""Values between two entries of the index by which a stretch finds its first value."""

CHUNK_WORDS = 1 << 12
"""Words of a bitmap, 64 elements each, between two entries of its index."""


class _SparseTensor(StoredTensor):
    """What both ways to store positions share: chunks, and an index of where they begin."""

    def __init__(
        self, name: str, entry: TensorEntry, values: torch.Tensor, positions: torch.Tensor
    ) -> None:
        self.shape = entry.shape
        self.dtype = TORCH_DTYPES[entry.dtype]
        self.size_bytes = values.nbytes + positions.nbytes
        self._name = name
        self._values = values

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Put a stretch's values to their places among zeros."""
        out = torch.zeros(max(0, stop - start), dtype=self.dtype)
        first, last = self._chunks(start, stop)
        if last > first:
            self._place(out, first, last, start)
        return out

    def add(
        self, theta: torch.Tensor, out: torch.Tensor, origin: int, alpha: float, team: Team
    ) -> bool:
        """Write theta + alpha * v to a stretch."""
        window = Window.of(theta, out, origin)
        if window is None or not window.is_stretch or theta.dtype != out.dtype:
            return False
        sides = [as_array(as_row(side, window.columns)) for side in (theta, out)]
        values = as_array(self._values)
        if sides[0] is None or sides[1] is None or values is None or not compiled_loops():
            return False
        start = window.start
        team.run(
            self._addition(
                (sides[0][first:last], sides[1][first:last]),
                values,
                (start + first, start + last),
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
    def _place(self, out: torch.Tensor, first: int, last: int, start: int) -> None:
        """Write the values of some chunks to `out`, whose first element has the number `start`."""

    @abstractmethod
    def _addition(
        self,
        sides: tuple[Array, Array],
        values: Array,
        stretch: tuple[int, int],
        alpha: np.float32,
    ) -> Callable[[], object]:
        """Return what writes theta + alpha * v to a stretch.

        Positions are looked up now: while one thread does that, no other can.
        """

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
        entry: The manifest's.
        values: `[k]`.
        gaps: `[k]`, one or two bytes each.
    """

    def __init__(
        self, name: str, entry: TensorEntry, values: torch.Tensor, gaps: torch.Tensor
    ) -> None:
        super().__init__(name, entry, values, gaps)
        self._gaps = gaps.numpy()

    @cached_property
    def _starts(self) -> Array:
        steps = np.zeros(-(-self._gaps.size // CHUNK_GAPS), dtype=np.uintp)
        if loops := compiled_loops():
            loops.count_steps(self._gaps, steps, *numbers(CHUNK_GAPS))
        else:
            for chunk in range(steps.size):
                gaps = self._gaps[chunk * CHUNK_GAPS : (chunk + 1) * CHUNK_GAPS]
                steps[chunk] = gaps.sum(dtype=np.int64) + gaps.size
        starts = np.concatenate((np.zeros(1, np.uintp), np.cumsum(steps, dtype=np.uintp)))
        if starts[-1] > self.elements:
            raise self._contradiction("its gaps lead beyond its last element")
        return starts.astype(np.int64)

    def _place(self, out: torch.Tensor, first: int, last: int, start: int) -> None:
        loops, values, sink = compiled_loops(), as_array(self._values), as_array(out)
        if loops is not None and values is not None and sink is not None:
            place = numbers(*self._values_of(first, last), int(self._starts[first]))
            stretch = numbers(start, start + out.numel())
            loops.place_gaps(sink, self._gaps, values, place, stretch)
            return
        for chunk in range(first, last):
            own = slice(*self._values_of(chunk, chunk + 1))
            steps = torch.from_numpy(self._gaps[own].astype(np.int64)) + 1
            at = torch.cumsum(steps, 0) + (int(self._starts[chunk]) - 1 - start)
            inside = (at >= 0) & (at < out.numel())
            out[at[inside]] = self._values[own][inside]

    def _addition(
        self,
        sides: tuple[Array, Array],
        values: Array,
        stretch: tuple[int, int],
        alpha: np.float32,
    ) -> Callable[[], object]:
        first, last = self._chunks(*stretch)
        place = numbers(*self._values_of(first, last), int(self._starts[first]))
        add = compiled_loops().add_gaps
        return partial(add, *sides, self._gaps, values, place, numbers(*stretch), alpha)

    def _values_of(self, first: int, last: int) -> tuple[int, int]:
        return first * CHUNK_GAPS, min(last * CHUNK_GAPS, self._gaps.size)


class BitmapTensor(_SparseTensor):
    """Values, and a bit for each element that says whether it has one.

    Args:
        name: The tensor's.
        entry: The manifest's.
        values: `[k]`.
        bitmap: Bytes, whole words of eight.
    """

    def __init__(
        self, name: str, entry: TensorEntry, values: torch.Tensor, bitmap: torch.Tensor
    ) -> None:
        super().__init__(name, entry, values, bitmap)
        self._bytes = bitmap.numpy()
        # A file's tensors need not lie at multiples of eight.
        aligned = self._bytes if self._bytes.ctypes.data % 8 == 0 else self._bytes.copy()
        self._words = aligned.view(np.uint64)

    @cached_property
    def _starts(self) -> Array:
        self._first_values  # noqa: B018 - the check of the whole
        chunks = -(-self._words.size // CHUNK_WORDS)
        starts = np.arange(chunks + 1, dtype=np.int64) * (CHUNK_WORDS * 64)
        starts[-1] = self.elements
        return starts

    @cached_property
    def _first_values(self) -> Array:
        """The number of each chunk's first value, and one past the last chunk's last."""
        counts = np.zeros(-(-self._words.size // CHUNK_WORDS), dtype=np.uintp)
        if loops := compiled_loops():
            loops.count_bits(self._words, counts, *numbers(CHUNK_WORDS))
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

    def _place(self, out: torch.Tensor, first: int, last: int, start: int) -> None:
        loops, values, sink = compiled_loops(), as_array(self._values), as_array(out)
        if loops is not None and values is not None and sink is not None:
            place, stretch = self._place_of(first), numbers(start, start + out.numel())
            loops.place_bitmap(sink, self._words, values, place, stretch)
            return
        mask = self._bits(first, last)
        whole = torch.zeros(mask.size, dtype=self.dtype)
        own = self._values[self._first_values[first] : self._first_values[last]]
        whole.masked_scatter_(torch.from_numpy(mask), own)
        skipped = start - first * CHUNK_WORDS * 64
        found = whole[skipped : skipped + out.numel()]
        out[: found.numel()].copy_(found)

    def _addition(
        self,
        sides: tuple[Array, Array],
        values: Array,
        stretch: tuple[int, int],
        alpha: np.float32,
    ) -> Callable[[], object]:
        place = self._place_of(self._chunks(*stretch)[0])
        add = compiled_loops().add_bitmap
        return partial(add, *sides, self._words, values, place, numbers(*stretch), alpha)

    def _place_of(self, chunk: int) -> tuple[Any, ...]:
        return numbers(chunk * CHUNK_WORDS, int(self._first_values[chunk]))

    def _bits(self, first: int, last: int) -> np.ndarray:
        packed = self._bytes[first * CHUNK_WORDS * 8 : last * CHUNK_WORDS * 8]
        return np.unpackbits(packed, bitorder="little").view(bool)
