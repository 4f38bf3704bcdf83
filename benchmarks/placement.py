"""Ways to bring theta + alpha * v into a parameter on a device: candidates for the loader.

Each takes one tensor of the target, the stored parts of the vector's, alpha, and the parameter; it
returns the bytes that had to cross the bus. All are exact: product and sum are two kernels, each
rounding to float32, because a GPU compiler contracts them into one rounding where one kernel does
both (torch.add with alpha, torch.addcmul).

Nothing here imports vllm or this package: it is to move into `vllm_rvec/loader/`, and runs on a
machine that has torch alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["DenseParts", "Int8Parts", "Parts", "SparseParts", "Staging", "placements", "plain"]

CHUNK_ELEMENTS = 1 << 22
"""Of one step: 8 MiB of bf16 in a pinned buffer, 32 MiB of float32 scratch on the device. Large
enough to hide a launch, small beside the largest tensor of a model worth a GPU."""
BLOCK_VALUES = 1024
"""Of a sparse tensor: their places span 262,144 elements at most, as a gap has 8 bits."""
BUFFERS = 3
"""Pinned buffers in turn: one is filled while one crosses the bus and one waits its turn."""


class Parts(Protocol):
    """One tensor of a vector as it is stored, on any device."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return what has to cross the bus for a sum on the device."""

    def steps(self) -> Iterator[tuple[int, int, tuple[torch.Tensor, ...]]]:
        """Yield (first element, end, the parts' slices that decode to them)."""

    def decode(self, slices: Sequence[torch.Tensor], count: int) -> torch.Tensor:
        """Return `count` elements of v in float32, where the slices are."""


@dataclass(frozen=True, slots=True)
class DenseParts:
    """`dense`: v itself."""

    v: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return v."""
        return (self.v,)

    def steps(self) -> Iterator[tuple[int, int, tuple[torch.Tensor, ...]]]:
        """Cut v into chunks."""
        flat = self.v.reshape(-1)
        for first in range(0, flat.numel(), CHUNK_ELEMENTS):
            chunk = flat[first : first + CHUNK_ELEMENTS]
            yield first, first + chunk.numel(), (chunk,)

    def decode(self, slices: Sequence[torch.Tensor], _count: int) -> torch.Tensor:
        """Widen."""
        return slices[0].float()


@dataclass(frozen=True, slots=True)
class Int8Parts:
    """`int8`: codes [out, in] and a float32 scale for each row."""

    codes: torch.Tensor
    scale: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return codes and scales."""
        return self.codes, self.scale

    def steps(self) -> Iterator[tuple[int, int, tuple[torch.Tensor, ...]]]:
        """Cut whole rows."""
        columns = self.codes.shape[1]
        rows = max(1, CHUNK_ELEMENTS // columns)
        for row in range(0, self.codes.shape[0], rows):
            codes = self.codes[row : row + rows]
            first = row * columns
            yield first, first + codes.numel(), (codes, self.scale[row : row + rows])

    def decode(self, slices: Sequence[torch.Tensor], _count: int) -> torch.Tensor:
        """Multiply each row with its scale."""
        codes, scale = slices
        return codes.float().mul_(scale.unsqueeze(1)).view(-1)


@dataclass(frozen=True, slots=True)
class SparseParts:
    """`sparse`: values, and how many zeros come before each."""

    values: torch.Tensor
    gaps: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return values and gaps."""
        return self.values, self.gaps

    def steps(self) -> Iterator[tuple[int, int, tuple[torch.Tensor, ...]]]:
        """Cut so many values that their places span no more than a chunk.

        The place of a value is known only by adding all gaps before it. A quick pass over them here
        gives each step its first element; the places within are the device's to add up.
        """
        blocks = self.gaps.split(BLOCK_VALUES)
        spans = torch.tensor([int(gaps.sum(dtype=torch.int64)) + gaps.numel() for gaps in blocks])
        ends, done, first = torch.cumsum(spans, 0), 0, 0
        while done < len(blocks):
            fitting = int(torch.searchsorted(ends, first + CHUNK_ELEMENTS, right=True))
            after = max(fitting, done + 1)
            values = slice(done * BLOCK_VALUES, after * BLOCK_VALUES)
            end = int(ends[after - 1])
            yield first, end, (self.values[values], self.gaps[values])
            done, first = after, end

    def decode(self, slices: Sequence[torch.Tensor], count: int) -> torch.Tensor:
        """Put values behind their gaps."""
        values, gaps = slices
        places = torch.cumsum(gaps.to(torch.int32) + 1, 0) - 1
        v = torch.zeros(count, dtype=torch.float32, device=values.device)
        return v.index_copy_(0, places, values.float())


class Staging:
    """Pinned buffers of the host that take turns; ordinary memory where there is no GPU.

    Args:
        device: Where what is staged goes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._turn = 0
        self._buffers: list[torch.Tensor] = []
        self._free: list[torch.cuda.Event | None] = [None] * BUFFERS

    def send(self, sources: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]) -> None:
        """Copy each source into a pinned buffer, and have it sent to its `out` from there."""
        buffers = self._next(sum(_aligned(source.nbytes) for source in sources))
        offset = 0
        for source, out in zip(sources, outs, strict=True):
            staged = buffers[offset : offset + source.nbytes].view(source.dtype).view(source.shape)
            staged.copy_(source)
            out.copy_(staged, non_blocking=True)
            offset += _aligned(source.nbytes)
        self._sent()

    def fill(self, fill: Callable[[torch.Tensor], object], out: torch.Tensor) -> None:
        """Let `fill` write a pinned buffer of out's shape, and have it sent to `out`."""
        staged = self._next(out.nbytes)[: out.nbytes].view(out.dtype).view(out.shape)
        fill(staged)
        out.copy_(staged, non_blocking=True)
        self._sent()

    def _next(self, size_bytes: int) -> torch.Tensor:
        self._turn = (self._turn + 1) % BUFFERS
        if not self._buffers:
            self._buffers = [self._buffer(size_bytes) for _ in range(BUFFERS)]
        if (sent := self._free[self._turn]) is not None:
            sent.synchronize()
        if self._buffers[self._turn].numel() < size_bytes:
            self._buffers[self._turn] = self._buffer(size_bytes)
        return self._buffers[self._turn]

    def _buffer(self, size_bytes: int) -> torch.Tensor:
        is_gpu = self.device.type == "cuda"
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=is_gpu)

    def _sent(self) -> None:
        if self.device.type == "cuda":
            self._free[self._turn] = event = torch.cuda.Event()
            event.record()


def placements(staging: Staging) -> dict[str, Callable[..., int]]:
    """Return the ways by name."""
    return {
        "added on the host, pageable": _host_pageable,
        "added on the host, pinned": partial(_host_pinned, staging),
        "added on the device, pageable": _device_pageable,
        "added on the device, pinned": partial(_device_pinned, staging),
    }


def plain(theta: torch.Tensor, _parts: Parts, _alpha: float, out: torch.Tensor) -> int:
    """Move theta alone, as vLLM does: what the ways are compared with."""
    out.copy_(theta)
    return theta.nbytes


def _host_pageable(theta: torch.Tensor, parts: Parts, alpha: float, out: torch.Tensor) -> int:
    total = torch.empty_like(theta)
    for first, end, slices in _covering(parts, theta.numel()):
        _add(_flat(theta)[first:end], parts, slices, alpha, _flat(total)[first:end])
    out.copy_(total)
    return theta.nbytes


def _host_pinned(
    staging: Staging, theta: torch.Tensor, parts: Parts, alpha: float, out: torch.Tensor
) -> int:
    for first, end, slices in _covering(parts, theta.numel()):
        stretch = _flat(theta)[first:end]
        fill = partial(_add, stretch, parts, slices, alpha)
        staging.fill(fill, _flat(out)[first:end])
    return theta.nbytes


def _device_pageable(theta: torch.Tensor, parts: Parts, alpha: float, out: torch.Tensor) -> int:
    out.copy_(theta)
    for first, end, slices in _covering(parts, theta.numel()):
        there = tuple(part.to(out.device) for part in slices)
        stretch = _flat(out)[first:end]
        _add(stretch, parts, there, alpha, stretch)
    return theta.nbytes + _parts_bytes(parts)


def _device_pinned(
    staging: Staging, theta: torch.Tensor, parts: Parts, alpha: float, out: torch.Tensor
) -> int:
    for first, end, slices in _covering(parts, theta.numel()):
        stretch = _flat(out)[first:end]
        there = tuple(torch.empty_like(part, device=out.device) for part in slices)
        staging.send((_flat(theta)[first:end], *slices), (stretch, *there))
        _add(stretch, parts, there, alpha, stretch)
    return theta.nbytes + _parts_bytes(parts)


def _covering(parts: Parts, elements: int) -> Iterator[tuple[int, int, tuple[torch.Tensor, ...]]]:
    """Yield the parts' steps, then what is left behind the last value, without slices."""
    end = 0
    for first, end, slices in parts.steps():
        yield first, end, slices
    if end < elements:
        yield end, elements, ()


def _add(
    theta: torch.Tensor,
    parts: Parts,
    slices: Sequence[torch.Tensor],
    alpha: float,
    out: torch.Tensor,
) -> None:
    """Write theta + alpha * v to `out`, which may be theta; all on one device."""
    if slices:
        v = parts.decode(slices, theta.numel())
        v = v.clone() if v.data_ptr() == slices[0].data_ptr() else v
    else:
        v = torch.zeros(theta.numel(), device=theta.device)
    # Two kernels: two roundings. alpha is a float32 number by now, on every device.
    out.copy_(v.mul_(alpha).add_(theta))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1)


def _parts_bytes(parts: Parts) -> int:
    return sum(tensor.nbytes for tensor in parts.tensors())


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // 64) * 64
