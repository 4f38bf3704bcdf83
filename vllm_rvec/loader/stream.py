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
from vllm_rvec.vector.compatibility.lineage import LineageProbe
from vllm_rvec.vector.compatibility.quantization import quantization_level
from vllm_rvec.vector.compatibility.structure import tensor_findings
from vllm_rvec.vector.fitting import fitted_part
from vllm_rvec.vector.stored import Team

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vllm_rvec.vector.compatibility.report import Finding, Level
    from vllm_rvec.vector.compatibility.structure import Pairing
    from vllm_rvec.vector.reader import VectorReader

__all__ = ["FusedStream"]

MOST_SAMPLED = 16
"""Tensors of the sketch that a load looks at: 1,024 weights. `check` and `serve` look at all. Each
weight is a memory page of its own, and so many of them would show in the load time of a small
model."""


@dataclass(slots=True)
class FusedStream:
    """One pass over a target's tensors, and what was seen on the way."""

    vector: VectorReader
    """The stored vector."""
    pairing: Pairing
    """Which of its tensors goes with which of the target's."""
    alpha: float
    """The scaling coefficient; 0 hands every tensor through as it is."""
    dtype: torch.dtype
    """The model's dtype."""
    ledger: FuseLedger = field(default_factory=FuseLedger)
    """What was fused."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The target's tensors that have streamed by."""
    quantized: set[str] = field(default_factory=set)
    """Those of a dtype that nothing can be added to."""
    is_complete: bool = False
    """Whether the stream was read to its end."""
    _samples: dict[str, torch.Tensor] = field(default_factory=dict)
    _probe: LineageProbe = field(init=False)
    _team: Team = field(default_factory=Team)

    def __post_init__(self) -> None:
        self._probe = LineageProbe(self.vector.manifest, MOST_SAMPLED)

    def fuse(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Hand on a checkpoint's tensors, each as the sum with its part of the vector.

        What does not fit goes through as it is; `findings` tells of it at the end.

        Args:
            weights: (checkpoint name, tensor on any device), every tensor once.

        Yields:
            The same names; theta itself where alpha or the vector's tensor is zero.
        """
        for name, theta in weights:
            self.shapes[name] = tuple(theta.shape)
            if theta.dtype not in FLOAT_DTYPES:
                self.quantized.add(name)
            yield name, self._sum(name, theta)
            self._sample(name, theta)  # by now its pages are in memory
        self.is_complete = True

    def findings(self, *, is_tied: object = None) -> list[Finding]:
        """Compare the vector with the tensors that streamed by, as `tensor_findings`."""
        return tensor_findings(self.pairing, self.shapes, is_tied=is_tied)

    def quantization(self, method: str) -> Level | None:
        """Judge a target by the dtypes that streamed by, as `quantization_level`."""
        is_float = {name: name not in self.quantized for name in self.shapes}
        return quantization_level(self.pairing, method, is_float)

    def lineage(self) -> Level:
        """Compare the vector's sketch with the weights that streamed by."""
        for name, sample in self._samples.items():
            self._probe.add(name, sample.float().cpu().numpy())
        return self._probe.level()

    def _sample(self, name: str, theta: torch.Tensor) -> None:
        positions = self._probe.positions(name, self.shapes[name])
        if positions is not None and theta.dtype in FLOAT_DTYPES:
            # What is made of it waits for the end of the load.
            here = torch.from_numpy(positions).to(theta.device)
            self._samples[name] = torch.take(theta, here)

    def _sum(self, name: str, theta: torch.Tensor) -> torch.Tensor:
        if self.alpha == 0 or theta.dtype not in FLOAT_DTYPES:
            return theta
        v = fitted_part(self.vector, self.pairing, name, self.shapes[name], self.alpha)
        if v is None:
            return theta
        # Some of vLLM's loaders stream into a device's memory; the sum is the CPU's.
        theta = theta.cpu().contiguous()
        dtype = torch.promote_types(theta.dtype, self.dtype)
        fusion = Fusion(
            ((v, self.alpha),), int(theta.storage_offset()), dtype, self.ledger, self._team
        )
        return FusedTensor(theta, fusion)
