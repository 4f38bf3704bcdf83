"""Random vectors of the same size as a stored one: the controls that an honest comparison needs.

If a random vector of the same norms moves a model as far as the real one does, then what was
measured is the distance, not the direction. Two kinds:

gaussian      independent normal numbers, scaled to each tensor's Frobenius norm
permutation   each tensor's own elements at random places: the same values, the same norm, and
              nothing left of rows and columns

A tensor's numbers depend on the seed and its name only, not on threads or on the other tensors, and
come from numpy's Philox stream (see `randomness`). With one release of numpy they are the same on
every machine, but that the norm a Gaussian is scaled to may be summed in another order there, and a
last bit rounded the other way. numpy may change how it makes normal numbers and shuffles with a
release (NEP 19); tests pin what it does now.

One tensor is worked on at a time; memory is below four times the largest one in float32. A
permutation takes several times as long as normal numbers: it reads and writes all over the tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from vllm_rvec.checkpoint.dtypes import TORCH_DTYPES
from vllm_rvec.vector.derive.inputs import VectorInput
from vllm_rvec.vector.derive.randomness import raw_numbers
from vllm_rvec.vector.derive.scaling import frobenius, scaled
from vllm_rvec.vector.derive.writing import Recipe, Storage, write_derived
from vllm_rvec.vector.extract import stored_dtype

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vllm_rvec.checkpoint.fetch import Located
    from vllm_rvec.vector.derive.writing import Derivation, Made

__all__ = ["random_like"]

BLOCK_ELEMENTS: Final = 1 << 17

FITTING_ROUNDS: Final = 4
"""How often a factor is corrected for what rounding to 16 bits did to the norm. Each round gains
about a digit, down to what one element's last bit weighs."""

SIZED_INTEGERS = {2: torch.int16, 4: torch.int32}


def random_like(
    vector: Path | Located,
    output: Path,
    *,
    seed: int,
    permute: bool = False,
    encoding: str = "auto",
    dtype: str | None = None,
    rank: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> Derivation:
    """Write a random vector with a stored one's names, shapes and norms to a new folder.

    The Frobenius norm of each float32 tensor is the original's within a relative 2^-24 (one
    rounding of each element; norms in the range of normal numbers). In bfloat16 and float16 the
    rounding of elements moves it by at most 2^-8 and 2^-11; corrected for, what was left was below
    10^-4 for tensors of 1000 elements and more (in the median 3 * 10^-6). Ask for dtype float32
    where that is too much. None of this holds for int8 and lowrank. Zero tensors stay zero.

    Args:
        vector: The stored vector.
        output: The new vector's folder, which must not exist.
        seed: Any integer.
        permute: Take each tensor's own elements in a random order, in place of normal numbers.
        encoding: auto, dense, sparse, int8, lowrank.
        dtype: float32, bfloat16, float16; None for what each tensor of the original decodes to.
        rank: Of lowrank.
        on_progress: Called after each tensor with the weights done and the weights in all.

    Returns:
        What was made.

    Raises:
        ConfigError: The output exists or can't be written, or a number overflows its dtype.
        VectorFormatError: The input is no vector that this version reads.
        VectorCorruptError: The input is damaged.
    """
    source, storage = VectorInput(vector), Storage(encoding, dtype, rank)
    kind = "permutation" if permute else "gaussian"
    recipe = Recipe(
        operation="random-like",
        parameters={"kind": kind, "seed": str(seed)},
        inputs=(source,),
        outline=source.manifest,
        storage=storage,
        make=_Randomizer(source, seed, kind, storage).make,
    )
    return write_derived(output, recipe, on_progress)


@dataclass(frozen=True, slots=True)
class _Randomizer:
    """Makes single tensors."""

    source: VectorInput
    seed: int
    kind: str
    storage: Storage

    def make(self, name: str) -> Made:
        """Make one tensor."""
        v = self.source.tensor(name)
        if v is None:
            return None
        generator = np.random.Generator(raw_numbers(self.seed, name, self.kind))
        if self.kind == "permutation":
            return _permuted(v, generator)
        own = TORCH_DTYPES[self.source.manifest.tensors[name].dtype]
        asked = self.storage.dtype
        shape, norm, dtype = v.shape, frobenius(v), own if asked is None else stored_dtype(asked)
        del v  # a decoded tensor is memory of its own
        return _fitted(_normal(shape, generator), norm, dtype)


def _permuted(v: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    out = v.clone(memory_format=torch.contiguous_format)
    # As integers: numpy has no bfloat16.
    generator.shuffle(out.view(-1).view(SIZED_INTEGERS[out.itemsize]).numpy())
    return out


def _normal(shape: torch.Size, generator: np.random.Generator) -> torch.Tensor:
    """Draw float32 numbers; rounded from float64, so that no platform's float32 functions count."""
    out = torch.empty(shape, dtype=torch.float32)
    flat = out.view(-1).numpy()
    for start in range(0, flat.size, BLOCK_ELEMENTS):
        block = flat[start : start + BLOCK_ELEMENTS]
        block[:] = generator.standard_normal(block.size)
    return out


def _fitted(z: torch.Tensor, norm: float, dtype: torch.dtype) -> torch.Tensor:
    """Scale a tensor so that, rounded to a dtype, it has a norm."""
    factor = norm / (frobenius(z) or 1.0)
    best = scaled(z, factor, dtype)
    found = frobenius(best)
    smallest = abs(found - norm)
    for _ in range(0 if dtype == torch.float32 else FITTING_ROUNDS):
        # Infinite: an element overflows, which is told when it is stored.
        if found == 0 or not np.isfinite(found):
            break
        factor *= norm / found
        again = scaled(z, factor, dtype)
        found = frobenius(again)
        if abs(found - norm) < smallest:
            best, smallest = again, abs(found - norm)
    return best
