"""What every stored tensor can do: give a stretch of its elements, perhaps add itself at once."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm_rvec.vector.stored.team import Team
    from vllm_rvec.vector.stored.window import Window

__all__ = ["Array", "Compact", "StoredTensor", "as_array", "as_sides", "decoded"]

Array = npt.NDArray[Any]
"""What the compiled loops take: float32, the bits of bfloat16, bytes, gaps, words."""


class Compact(NamedTuple):
    """A stretch of elements as it is stored, to be decoded elsewhere, on a device say."""

    tensors: tuple[torch.Tensor, ...]
    """Contiguous, on the CPU; views of the file where that is possible."""
    decode: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    """Takes copies of the tensors, all on one device, and returns the stretch there, bit for bit
    what `StoredTensor.read` gives. It shares memory with the copies or with nothing."""


class StoredTensor(ABC):
    """A tensor of a vector, as it lies in its file.

    Attributes:
        kind: How it is stored, in a word.
        shape: Of the tensor, `[out, in]` for a linear weight.
        dtype: What its elements decode to.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_view = False
    """Whether `read` gives a view of the file, at no cost."""
    check: Callable[[], None] = staticmethod(lambda: None)
    """Raises VectorCorruptError where its file is no longer as it was when it was opened. To be
    called before elements are read, where that is not at once."""

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @abstractmethod
    def read(self, start: int, stop: int) -> torch.Tensor:
        """Decode a stretch of its elements.

        Args:
            start: The first element, counted through the whole tensor.
            stop: One past the last.

        Returns:
            A flat tensor of `dtype`.

        Raises:
            VectorCorruptError: Its parts contradict each other.
        """

    def compact(self, start: int, stop: int) -> Compact:
        """Give a stretch of its elements in the form that takes the fewest bytes to send.

        Here that is the stretch, decoded.

        Args:
            start: As for `read`.
            stop: As for `read`.

        Raises:
            VectorCorruptError: Its parts contradict each other.
        """
        return decoded(self.read(start, stop))

    def add(
        self,
        theta: torch.Tensor,
        out: torch.Tensor,
        origin: int,
        alpha: float,
        team: Team,
    ) -> bool:
        """Write theta + alpha * v in one pass, where there is a compiled loop for it.

        Args:
            theta: A view, its axes in the order of `window.in_order`.
            out: Where to; of the same shape.
            origin: The storage offset of the contiguous tensor that theta is a view of.
            alpha: The scaling coefficient, not 0.
            team: Threads to share the work.

        Returns:
            False where nothing was written.
        """
        del theta, out, origin, alpha, team
        return False


def decoded(stretch: torch.Tensor) -> Compact:
    """Give a stretch that is sent as it is."""
    return Compact((stretch,), operator.itemgetter(0))


def as_array(tensor: torch.Tensor) -> Array | None:
    """Show a contiguous flat tensor to the compiled loops; None where its dtype has none."""
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy().view(np.uint16)
        return bits
    return tensor.numpy() if tensor.dtype == torch.float32 else None


def as_sides(theta: torch.Tensor, out: torch.Tensor, window: Window) -> tuple[Array, Array] | None:
    """Show a window of theta and its output to the compiled loops, each from its first element on.

    Returns:
        None where there is no loop for their dtypes.
    """
    if theta.dtype != out.dtype:
        return None
    weights, sink = as_array(_row(theta, window.span)), as_array(_row(out, window.out_span))
    return None if weights is None or sink is None else (weights, sink)


def _row(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """Take the elements that follow each other in memory from a tensor's first one on."""
    return tensor.as_strided((elements,), (1,), tensor.storage_offset())
