"""`int8`: a byte an element, and a scale for each row."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_rvec.vector.stored.compiled import compiled_loops, numbers
from vllm_rvec.vector.stored.tensor import Compact, StoredTensor, as_sides, decoded
from vllm_rvec.vector.stored.window import Window

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm_rvec.vector.stored.team import Team

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
        self._steps = steps.reshape(-1)
        self._scales = scales
        self._columns = self.shape[-1]

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Multiply every row of a stretch with its scale."""
        tensors, decode = self.compact(start, stop)
        return decode(tensors)

    def compact(self, start: int, stop: int) -> Compact:
        """Give the bytes of whole rows, and their scales; of a single row, the stretch's bytes."""
        if stop <= start:
            return decoded(torch.empty(0, dtype=self.dtype))
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
        if window is None or loops is None or (sides := as_sides(theta, out, window)) is None:
            return False
        weights, sink = sides
        steps = self._steps[window.start : window.start + window.span].numpy()
        scales = self._scales.numpy()
        team.run(
            partial(
                loops.add_int8,
                weights[first:],
                sink[out_first:],
                steps[first:],
                scales,
                numbers(window.start + first, self._columns),
                numbers(rows, columns, window.stride, window.out_stride),
                np.float32(alpha),
            )
            for first, out_first, rows, columns in _pieces(window, team)
        )
        return True


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
