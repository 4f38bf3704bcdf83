"""The fused weight stream: a checkpoint's tensors in, the same names with theta + alpha * v out.

Works on names and tensors of the checkpoint, before vLLM's own name mapping, packing and slicing,
which then apply to the sum as they do to any weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from vllm_rvec.arithmetic import FLOAT_DTYPES
from vllm_rvec.loader.fused_tensor import FusedTensor, FuseLedger, Fusion
from vllm_rvec.vector.compatibility import check_tensors, part_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vllm_rvec.vector.reader import VectorReader

__all__ = ["FusedStream"]


@dataclass(slots=True)
class FusedStream:
    """One pass over a target's tensors, and what was seen on the way."""

    vector: VectorReader
    """The stored vector."""
    alpha: float
    """The scaling coefficient; 0 hands every tensor through as it is."""
    dtype: torch.dtype
    """The model's dtype."""
    target: str
    """The target's path or id, for messages."""
    ledger: FuseLedger = field(default_factory=FuseLedger)
    """What was fused."""
    is_complete: bool = False
    """Whether every tensor streamed by and matched."""

    def fuse(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Hand on a checkpoint's tensors, each as the sum with its part of the vector.

        Args:
            weights: (checkpoint name, tensor on the CPU), every tensor once.

        Yields:
            The same names; theta itself where alpha or the vector's tensor is zero.

        Raises:
            IncompatibleVectorError: At the end of the stream, with every name that only one side
                has and every shape that differs.
        """
        shapes = dict[str, tuple[int, ...]]()
        quantized = list[str]()
        for name, theta in weights:
            shapes[name] = tuple(theta.shape)
            if theta.dtype not in FLOAT_DTYPES:
                quantized.append(name)
            yield name, self._sum(name, theta)
        check_tensors(self.vector.manifest, shapes, target=self.target, quantized=quantized)
        self.is_complete = True

    def _sum(self, name: str, theta: torch.Tensor) -> torch.Tensor:
        v = self._part(name)
        # What does not match goes through unfused: the end of the stream reports all of it.
        if v is None or v.shape != theta.shape or theta.dtype not in FLOAT_DTYPES:
            return theta
        dtype = torch.promote_types(theta.dtype, self.dtype)
        return FusedTensor(theta, v, Fusion(self.alpha, dtype, self.ledger))

    def _part(self, name: str) -> torch.Tensor | None:
        part = part_for(self.vector.manifest, name)
        if self.alpha == 0 or part is None:
            return None
        return self.vector.tensor(part)
