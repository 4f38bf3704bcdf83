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
from vllm_rvec.loader.placement import Placer
from vllm_rvec.vector.compatibility.lineage import LineageProbe
from vllm_rvec.vector.compatibility.quantization import quantization_level
from vllm_rvec.vector.compatibility.structure import structure_level, tensor_findings
from vllm_rvec.vector.stored import Team

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from vllm_rvec.loader.placement import FuseOn
    from vllm_rvec.vector.addend import Addend
    from vllm_rvec.vector.compatibility.report import Level

__all__ = ["FusedStream"]

MOST_SAMPLED = 16
"""Tensors of the sketch that a load looks at: 1,024 weights. `check` and `serve` look at all. Each
weight is a memory page of its own, and so many of them would show in the load time of a small
model."""


@dataclass(slots=True)
class FusedStream:
    """One pass over a target's tensors, and what was seen on the way."""

    addends: Sequence[Addend]
    """What is added, in this order."""
    alpha: float
    """What the alphas of all addends were multiplied with; at 0 every tensor stays as it is."""
    dtype: torch.dtype
    """The model's dtype."""
    fuse_on: FuseOn = "auto"
    """Where to add what goes to parameters on a GPU."""
    ledger: FuseLedger = field(default_factory=FuseLedger)
    """What was fused."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The target's tensors that have streamed by."""
    quantized: set[str] = field(default_factory=set)
    """Those of a dtype that nothing can be added to."""
    is_complete: bool = False
    """Whether the stream was read to its end."""
    _samples: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    _probes: list[LineageProbe] = field(init=False)
    _team: Team = field(default_factory=Team)
    placer: Placer = field(init=False)
    """What brings sums to a GPU."""

    def __post_init__(self) -> None:
        self.placer = Placer(self._team, self.fuse_on)
        self._probes = [LineageProbe(a.reader.manifest, MOST_SAMPLED) for a in self.addends]

    def fuse(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Hand on a checkpoint's tensors, each as the sum with its parts of the vectors.

        What does not fit goes through as it is; `levels` tell of it at the end.

        Args:
            weights: (checkpoint name, tensor on any device), every tensor once.

        Yields:
            The same names; theta itself where nothing is added.
        """
        for name, theta in weights:
            self.shapes[name] = tuple(theta.shape)
            if theta.dtype not in FLOAT_DTYPES:
                self.quantized.add(name)
            yield name, self._sum(name, theta)
            self._sample(name, theta)  # by now its pages are in memory
        self.placer.finish()
        for addend in self.addends:
            addend.reader.check_unchanged()
        self.is_complete = True

    def levels(
        self,
        *,
        is_tied: object = None,
        quantization: str = "",
        is_left_out: Callable[[str], bool] | None = None,
        is_beside: bool = False,
    ) -> Iterator[list[Level]]:
        """Judge each addend by the tensors that streamed by: quantization, structure, lineage.

        Args:
            is_tied: `tie_word_embeddings` of the target's configuration, where it has it.
            quantization: What the target's configuration calls its own; empty for none.
            is_left_out: Tells of tensors that the target has though they did not stream by.
            is_beside: Whether the vectors stay beside the weights, which may be codes then.
        """
        if is_beside and quantization:
            yield from ([self._lineage(number)] for number in range(len(self.addends)))
            return
        is_float = {name: name not in self.quantized for name in self.shapes}
        for number, addend in enumerate(self.addends):
            quantized = quantization_level(addend.pairing, quantization, is_float)
            findings = tensor_findings(
                addend.pairing, self.shapes, is_tied=is_tied, is_left_out=is_left_out
            )
            yield [
                *([] if quantized is None else [quantized]),
                structure_level((), findings),
                self._lineage(number),
            ]

    def _lineage(self, number: int) -> Level:
        """Compare a vector's sketch with the weights that streamed by."""
        probe = self._probes[number]
        for (sampled_for, name), sample in self._samples.items():
            if sampled_for == number:
                probe.add(name, sample.float().cpu().numpy())
        return probe.level()

    def _sample(self, name: str, theta: torch.Tensor) -> None:
        if theta.dtype not in FLOAT_DTYPES:
            return
        for number, probe in enumerate(self._probes):
            if (positions := probe.positions(name, self.shapes[name])) is not None:
                # What is made of it waits for the end of the load.
                here = torch.from_numpy(positions).to(theta.device)
                self._samples[number, name] = torch.take(theta, here)

    def _sum(self, name: str, theta: torch.Tensor) -> torch.Tensor:
        if self.alpha == 0 or theta.dtype not in FLOAT_DTYPES:
            return theta
        found = [addend.term(name, self.shapes[name]) for addend in self.addends]
        terms = tuple(term for term in found if term is not None)
        if not terms:
            return theta
        # Some of vLLM's loaders stream into a device's memory.
        theta = (theta if self.placer.adds_on(theta.device) else theta.cpu()).contiguous()
        dtype = torch.promote_types(theta.dtype, self.dtype)
        origin = int(theta.storage_offset())
        fusion = Fusion(terms, origin, dtype, self.ledger, self._team, self.placer)
        return FusedTensor(theta, fusion)
