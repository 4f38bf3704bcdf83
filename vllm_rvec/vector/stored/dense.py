"""`dense`: a view of the file."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from vllm_rvec.vector.stored.compiled import compiled_loops
from vllm_rvec.vector.stored.tensor import StoredTensor, as_array, as_sides
from vllm_rvec.vector.stored.window import Window

if TYPE_CHECKING:
    import torch

    from vllm_rvec.vector.stored.team import Team

__all__ = ["DenseTensor"]

LOOP_ELEMENTS = 1 << 15
"""With fewer, what is stored stays in the cache, and PyTorch's kernel is started sooner."""


class DenseTensor(StoredTensor):
    """A tensor that is stored as it is.

    Args:
        tensor: Contiguous, one of `arithmetic.FLOAT_DTYPES`.
    """

    kind = "dense"
    is_view = True

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype
        self._flat = tensor.reshape(-1)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return a view of a stretch."""
        return self._flat[start:stop]

    def add(
        self, theta: torch.Tensor, out: torch.Tensor, origin: int, alpha: float, team: Team
    ) -> bool:
        """Write theta + alpha * v to a stretch."""
        if theta.numel() < LOOP_ELEMENTS:
            return False
        window, loops = Window.of(theta, out, origin), compiled_loops()
        if window is None or not window.is_stretch or loops is None:
            return False
        own = self._flat[window.start : window.start + window.columns]
        sides, values = as_sides(theta, out, window), as_array(own)
        if sides is None or values is None:
            return False
        arrays = (*sides, values)
        team.run(
            partial(loops.add_dense, *(a[first:last] for a in arrays), np.float32(alpha))
            for first, last in team.shares(window.columns)
        )
        return True
