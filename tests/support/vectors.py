"""Stored vectors with chosen tensors, for tests that compute on them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tests.support.tiny_vectors import write_vector
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.compatibility.lineage import make_sketch
from vllm_rvec.vector.encodings import Choice, Source, encode
from vllm_rvec.vector.encodings.lowrank import product
from vllm_rvec.vector.encodings.parts import Encoded, in_memory
from vllm_rvec.vector.layout import LORA_A, LORA_B

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from vllm_rvec.vector.manifest import Sketch

__all__ = ["Factored", "decoded", "random_tensor", "sketch_of", "store_vector"]

Factored = tuple[torch.Tensor, torch.Tensor, float]
"""lora_A `[R, in]`, lora_B `[out, R]` and their scaling."""


def store_vector(
    folder: Path,
    tensors: Mapping[str, torch.Tensor | Factored | None],
    *,
    encoding: str = "auto",
    complete: bool = True,
    **fields: Any,
) -> Path:
    """Write a vector of given tensors, each in its own dtype; None for one of integers.

    Args:
        folder: Where to; must not exist.
        tensors: By name.
        encoding: One of `ENCODING_CHOICES`.
        complete: Whether the donors have no others.
        fields: Others of the manifest, as `write_vector` takes them.
    """
    encoded = {
        name: (
            tuple(v.shape) if isinstance(v, torch.Tensor) else _shape(v),
            _encoded(v, encoding),
        )
        for name, v in tensors.items()
    }
    return write_vector(folder, encoded, base_norm=2.0, complete=complete, **fields)


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a vector that are not zero."""
    reader = VectorReader(folder)
    found = ((name, reader.tensor(name)) for name in reader.manifest.tensors)
    return {name: v for name, v in found if v is not None}


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Draw normal numbers of a vector's size."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.01).to(dtype)


def sketch_of(seed: int, noise: float = 0.0) -> Sketch:
    """Make the sketch of a base donor that comes from an initialisation, a random step away."""
    shapes = {f"layers.{i}.weight": (32, 32) for i in range(8)}

    def sample(name: str, positions: np.ndarray) -> np.ndarray:
        number = int(name.split(".")[1])
        weights = np.random.default_rng((seed, number)).standard_normal(1024)
        steps = np.random.default_rng((seed, number, 1)).standard_normal(1024)
        found: np.ndarray = np.asarray(weights + noise * steps, dtype=np.float32)[positions]
        return found

    return make_sketch(shapes, sample)


def _shape(v: Factored | None) -> tuple[int, ...]:
    return (3,) if v is None else (v[1].shape[0], v[0].shape[1])


def _encoded(v: torch.Tensor | Factored | None, encoding: str) -> Encoded:
    if v is None:
        return Encoded("zero", "I64")
    if isinstance(v, torch.Tensor):
        encoded = encode(Source.of(v), Choice(encoding, v.dtype))
        # A norm that is not finite would not get into a manifest.
        return encoded if v.isfinite().all() else replace(encoded, squared_norm=0.0)
    lora_a, lora_b, scaling = v
    norm = float(product(lora_a, lora_b, scaling).double().norm())
    parts = in_memory(LORA_A, lora_a), in_memory(LORA_B, lora_b)
    return Encoded("lowrank", "F32", parts, scaling=scaling, squared_norm=norm**2)
