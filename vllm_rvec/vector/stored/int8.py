"""`int8`: a byte an element, and a scale for each row."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_rvec.vector.stored.compiled import compiled_loops, numbers
from vllm_rvec.vector.stored.tensor import Compact, StoredTensor, as_array, as_row
from vllm_rvec.vector.stored.window import Window

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from vllm_rvec.vector.stored.team import Team
    from vllm_rvec.vector.stored.tensor import Array

__all__ = ["Int8Tensor"]


class Int8Tensor(StoredTensor):
    """A tensor in whole steps of a row's scale; decoded, scale times step in float32.

    Args:
        steps: The bytes, in the tensor's shape.
        scales: Float32, one for each row; a row is the last dimension.
    """

    kind = "int8"
    dtype = torch.float32

    def __init__(self, steps: torch.Tensor, scales: torch.Tensor) -> None:
        self.shape = tuple(steps.shape)
        self.size_bytes = steps.nbytes + scales.nbytes
        self._steps = steps.reshape(-1)
        self._scales = scales
        self._columns = self.shape[-1]

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Multiply every row of a stretch with its scale."""
        if stop <= start:
            return torch.empty(0, dtype=torch.float32)
        first, last = start // self._columns, -(-stop // self._columns)
        rows = self._steps[first * self._columns : last * self._columns].view(-1, self._columns)
        whole = rows.float().mul_(self._scales[first:last].unsqueeze(1)).view(-1)
        return whole[start - first * self._columns : stop - first * self._columns]

    def compact(self, start: int, stop: int) -> Compact:
        """Give the bytes of whole rows, and their scales; of a single row, the stretch's bytes."""
        if stop <= start:
            return super().compact(start, stop)
        columns = self._columns
        first, last = start // columns, -(-stop // columns)
        whole = (start, stop) if last - first == 1 else (first * columns, last * columns)
        sent = self._steps[slice(*whole)], self._scales[first:last]
        return Compact(sent, partial(_decode, start=start - whole[0], count=stop - start))

    def add(
        self, theta: torch.Tensor, out: torch.Tensor, origin: int, alpha: float, team: Team
    ) -> bool:
        """Write theta + alpha * v to rows of any length and distance."""
        window, loops = Window.of(theta, out, origin), compiled_loops()
        if window is None or loops is None or theta.dtype != out.dtype:
            return False
        span = (window.rows - 1) * window.stride + window.columns
        out_span = (window.rows - 1) * window.out_stride + window.columns
        sides = as_array(as_row(theta, span)), as_array(as_row(out, out_span))
        if sides[0] is None or sides[1] is None:
            return False
        steps = self._steps[window.start : window.start + span].numpy()
        arrays = sides[0], sides[1], steps
        team.run(
            self._jobs(loops.add_int8, arrays, _pieces(window, team), window, np.float32(alpha))
        )
        return True

    def _jobs(
        self,
        add: Callable[..., object],
        arrays: tuple[Array, Array, Array],
        pieces: Iterable[tuple[int, int, int, int]],
        window: Window,
        alpha: np.float32,
    ) -> Iterator[Callable[[], object]]:
        theta, out, steps = arrays
        scales = self._scales.numpy()
        for first, out_first, rows, columns in pieces:
            yield partial(
                add,
                theta[first:],
                out[out_first:],
                steps[first:],
                scales,
                numbers(window.start + first, self._columns),
                numbers(rows, columns, window.stride, window.out_stride),
                alpha,
            )


def _decode(tensors: Sequence[torch.Tensor], *, start: int, count: int) -> torch.Tensor:
    """Multiply rows with their scales, and take a stretch of them."""
    steps, scales = tensors
    rows = steps.view(scales.numel(), -1).float().mul_(scales.unsqueeze(1))
    return rows.view(-1)[start : start + count]


def _pieces(window: Window, team: Team) -> Iterator[tuple[int, int, int, int]]:
    """Share a window out: first element on both sides, rows, columns."""
    if window.is_stretch:
        for first, last in team.shares(window.columns):
            yield first, first, 1, last - first
        return
    rows = -(-window.rows // team.size)
    for row in range(0, window.rows, rows):
        count = min(rows, window.rows - row)
        yield row * window.stride, row * window.out_stride, count, window.columns
