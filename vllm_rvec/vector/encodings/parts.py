"""What encodings are made of: safetensors entries, ready to be written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from vllm_rvec.vector.manifest import Encoding

__all__ = ["Encoded", "Part", "in_memory", "size_bytes"]


class Part(NamedTuple):
    """One safetensors entry."""

    suffix: str
    """What follows the tensor's name; empty for dense data."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Iterable[torch.Tensor]
    """The data in order, in this dtype."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tensor ready to be written."""

    encoding: Encoding
    dtype: str
    """What it decodes to, in safetensors' words."""
    parts: tuple[Part, ...] = ()
    scaling: float | None = None
    squared_norm: float = 0.0
    """Of what is stored."""
    squared_error: float = 0.0
    """Against the source."""


def size_bytes(parts: Iterable[Part]) -> int:
    """Return how many bytes parts take in a file."""
    return sum(math.prod(part.shape) * part.dtype.itemsize for part in parts)


def in_memory(suffix: str, tensor: torch.Tensor) -> Part:
    """Make a part of a tensor that is in memory."""
    return Part(suffix, tensor.dtype, tuple(tensor.shape), (tensor,))
