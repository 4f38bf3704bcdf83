"""Change a stored vector: leave tensors out, thin the others, multiply them.

The operations are done in this order, whatever the order of the options:

1. select: tensors that `include` and `exclude` leave out become zero;
2. density: the elements of largest magnitude stay (TIES, arXiv:2306.01708);
3. dare: elements are dropped at random, the rest is multiplied (DARE, arXiv:2311.03099);
4. rescale: all is multiplied, by a factor or back to the norm from before step 2.

One tensor is in memory at a time: as it is decoded, as step 2 leaves it, and in float32 what came
of it; below four times the largest tensor in float32.

What is dropped depends on the seed, the tensor's name and the element's position only (see
`randomness`). So a result is the same on every machine, bit for bit, with two exceptions: lowrank
tensors, whose product is not fixed in the last bit, and `rescale norm`, since processors sum a norm
in different orders, and a float32 rounding may then go the other way.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import numpy as np

from vllm_rvec.arithmetic import is_finite
from vllm_rvec.errors import ConfigError
from vllm_rvec.vector.alpha import alpha_problem
from vllm_rvec.vector.derive.inputs import VectorInput
from vllm_rvec.vector.derive.pruning import drop_randomly, keep_largest
from vllm_rvec.vector.derive.randomness import raw_numbers
from vllm_rvec.vector.derive.scaling import frobenius, scaled
from vllm_rvec.vector.derive.selection import select_names
from vllm_rvec.vector.derive.writing import Kept, Made, Recipe, Storage, write_derived
from vllm_rvec.vector.encodings import Encoded
from vllm_rvec.vector.encodings.lowrank import product
from vllm_rvec.vector.encodings.parts import in_memory
from vllm_rvec.vector.layout import LORA_A, LORA_B, part_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import torch

    from vllm_rvec.checkpoint.fetch import Located
    from vllm_rvec.vector.derive.writing import Derivation
    from vllm_rvec.vector.manifest import TensorEntry

__all__ = ["transform"]

logger = logging.getLogger(__name__)


def transform(
    vector: Path | Located,
    output: Path,
    *,
    density: float | None = None,
    dare: float | None = None,
    seed: int | None = None,
    rescale: float | Literal["norm"] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    encoding: str = "auto",
    dtype: str | None = None,
    rank: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> Derivation:
    """Write a changed vector to a new folder.

    With encoding auto, int8 and lowrank tensors stay as they are encoded where no element is
    touched on its own: a lowrank one that is multiplied gets another scaling. All others are
    decoded.

    Args:
        vector: The stored vector.
        output: The new vector's folder, which must not exist.
        density: In (0, 1]: of a tensor's n elements the `ceil(density * n)` largest stay.
        dare: In [0, 1): the probability with which an element is dropped.
        seed: Of dare, which needs one.
        rescale: A factor, rounded to float32 as alpha is: the result with alpha 1 is the vector
            with that alpha, bit for bit, but for lowrank tensors and lossy encodings. Or `norm`:
            each tensor gets the Frobenius norm that it had before density and dare, within the
            rounding of its dtype.
        include: Patterns of the names to keep; without any, all.
        exclude: Patterns of the names to leave out.
        encoding: auto, dense, sparse, int8, lowrank.
        dtype: float32, bfloat16, float16; None for the input's where that is exact, else float32.
        rank: Of lowrank.
        on_progress: Called after each tensor with the weights done and the weights in all.

    Returns:
        What was made.

    Raises:
        ConfigError: No operation, or one that makes no sense; a pattern that matches nothing; the
            output exists or can't be written; a result overflows.
        VectorFormatError: The input is no vector that this version reads.
        VectorCorruptError: The input is damaged.
    """
    wanted = _Operations(density, dare, seed, rescale, tuple(include), tuple(exclude))
    wanted.check()
    storage, source = Storage(encoding, dtype, rank), VectorInput(vector)
    transformer = _Transformer(
        source, wanted, storage, select_names(source.manifest.tensors, include, exclude)
    )
    recipe = Recipe(
        operation="transform",
        parameters=wanted.parameters(),
        inputs=(source,),
        outline=source.manifest,
        storage=storage,
        make=transformer.make,
    )
    return write_derived(output, recipe, on_progress)


@dataclass(frozen=True, slots=True)
class _Operations:
    """What was asked for."""

    density: float | None
    dare: float | None
    seed: int | None
    rescale: float | Literal["norm"] | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    @property
    def is_thinning(self) -> bool:
        """Whether elements are touched on their own."""
        return self.density is not None or self.dare is not None

    def check(self) -> None:
        """Refuse what makes no sense, all at once."""
        if problems := list(self._problems()):
            raise ConfigError(
                "this transformation can't be made",
                problems=problems,
                fix="see `vllm-rvec transform --help`",
            )

    def parameters(self) -> dict[str, str]:
        """Return what was asked for, for the lineage."""
        asked = {
            "include": " ".join(self.include),
            "exclude": " ".join(self.exclude),
            "density": self.density,
            "dare": self.dare,
            "seed": self.seed,
            "rescale": self.rescale,
        }
        return {name: str(value) for name, value in asked.items() if value not in {None, ""}}

    def _problems(self) -> Iterator[str]:
        density, dare = self.density, self.dare
        if not (self.is_thinning or self.rescale is not None or self.include or self.exclude):
            yield "nothing to do: give --density, --dare, --rescale, --include or --exclude"
        if density is not None and not 0 < density <= 1:
            yield f"--density {density}: a share above 0, at most 1"
        if dare is not None and not 0 <= dare < 1:
            yield f"--dare {dare}: a probability of at least 0, below 1"
        if dare is not None and self.seed is None:
            yield "--dare needs --seed: what is dropped depends on it"
        if dare is None and self.seed is not None:
            yield "--seed is of --dare only"
        if self.rescale == "norm" and not self.is_thinning:
            yield "--rescale norm: without --density or --dare the norm stays as it is"
        if why := _factor_problem(self.rescale):
            yield f"--rescale {self.rescale}: {why}"


def _factor_problem(rescale: float | str | None) -> str:
    if not isinstance(rescale, float | int):
        return ""
    return alpha_problem(rescale) if rescale else "leaves nothing of the vector"


@dataclass(frozen=True, slots=True)
class _Transformer:
    """Computes single tensors."""

    source: VectorInput
    wanted: _Operations
    storage: Storage
    selected: set[str]

    @property
    def factor(self) -> float:
        """The factor of rescale, as float32 holds it; 1 where there is none."""
        rescale = self.wanted.rescale
        return 1.0 if rescale is None or rescale == "norm" else float(np.float32(rescale))

    def make(self, name: str) -> Made:
        """Compute one tensor."""
        entry = self.source.manifest.tensors[name]
        if name not in self.selected or entry.encoding == "zero":
            return None
        if self._stays_encoded(entry):
            return self._kept(name, entry)
        v = self.source.tensor(name)
        return None if v is None else self._changed(name, v)

    def _changed(self, name: str, v: torch.Tensor) -> torch.Tensor:
        wanted, out = self.wanted, v
        if wanted.density is not None:
            # Of the decimal number that was written: 0.07 of 100 elements are 7, not 8.
            count = math.ceil(Fraction(str(wanted.density)) * v.numel())
            out = keep_largest(out, count)
        if wanted.dare is not None and wanted.seed is not None:
            out = drop_randomly(out, wanted.dare, raw_numbers(wanted.seed, name, "dare"))
        if wanted.rescale is None:
            return out
        if wanted.rescale == "norm":
            return _with_norm_of(name, out, v)
        return scaled(out, self.factor)

    def _stays_encoded(self, entry: TensorEntry) -> bool:
        if self.storage.encoding != "auto" or self.wanted.is_thinning:
            return False
        return entry.encoding == "lowrank" or (entry.encoding == "int8" and self.factor == 1)

    def _kept(self, name: str, entry: TensorEntry) -> Kept:
        reader = self.source.reader
        parts = {
            part.removeprefix(name): reader.part(part)
            for part in part_names(name, entry, reader.table)
        }
        decoded, scaling = self.source.tensor(name), entry.scaling
        if scaling is not None and self.factor != 1:
            scaling *= self.factor
            decoded = product(parts[LORA_A], parts[LORA_B], scaling)
        if decoded is None or not is_finite(decoded):
            raise _overflowing(name)
        squared_norm = frobenius(decoded) ** 2
        encoded = Encoded(
            entry.encoding,
            entry.dtype,
            tuple(in_memory(suffix, part) for suffix, part in parts.items()),
            scaling=scaling,
            squared_norm=squared_norm,
            squared_error=squared_norm * entry.error**2,
        )
        return Kept(encoded, entry.changed)


def _with_norm_of(name: str, out: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    norm = frobenius(out)
    if norm == 0:
        logger.warning("%s: nothing is left of it, so its norm can't be restored", name)
        return out
    return scaled(out, frobenius(before) / norm)


def _overflowing(name: str) -> ConfigError:
    return ConfigError(
        f"tensor {name!r} of the result is not finite",
        why="its product overflows float32",
        fix="use a smaller factor",
        tensor_name=name,
    )
