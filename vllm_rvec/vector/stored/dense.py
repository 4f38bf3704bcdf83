"""`dense`: a view of the file."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from vllm_rvec.vector.stored.compiled import compiled_loops
from vllm_rvec.vector.stored.tensor import StoredTensor, as_array, as_row
from vllm_rvec.vector.stored.window import Window

if TYPE_CHECKING:
    import torch

    from vllm_rvec.vector.stored.team import Team

__all__ = ["DenseTensor"]

JOB_ELEMENTS = 1 << 20


class DenseTensor(StoredTensor):
    """A tensor that is stored as it is.

    Args:
        tensor: Contiguous, one of `arithmetic.FLOAT_DTYPES`.
    """

    is_view = True

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype
        self.size_bytes = tensor.nbytes
        self._flat = tensor.reshape(-1)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return a view of a stretch."""
        return self._flat[start:stop]

    def add(
        self, theta: torch.Tensor, out: torch.Tensor, origin: int, alpha: float, team: Team
    ) -> bool:
        """Write theta + alpha * v where the dtypes differ; where they don't, PyTorch is as fast."""
        if theta.dtype == out.dtype == self.dtype or theta.dtype != out.dtype:
            return False
        window, loops = Window.of(theta, out, origin), compiled_loops()
        if window is None or not window.is_stretch or loops is None:
            return False
        own = self._flat[window.start : window.start + window.columns]
        sides = [as_array(side) for side in (as_row(theta, own.numel()), as_row(out, own.numel()))]
        values = as_array(own)
        if values is None or sides[0] is None or sides[1] is None:
            return False
        factor = np.float32(alpha)
        pieces = (
            slice(first, first + JOB_ELEMENTS) for first in range(0, own.numel(), JOB_ELEMENTS)
        )
        team.run(
            partial(loops.add_dense, sides[0][piece], sides[1][piece], values[piece], factor)
            for piece in pieces
        )
        return True
