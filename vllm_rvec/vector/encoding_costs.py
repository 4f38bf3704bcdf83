"""What a vector would take in each encoding, and what that would lose. Nothing is written."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import torch

from vllm_rvec.checkpoint.dtypes import DTYPE_NAMES
from vllm_rvec.errors import VectorCorruptError
from vllm_rvec.vector.encodings import Choice, Measures, Source, encode, measure
from vllm_rvec.vector.encodings.parts import size_bytes
from vllm_rvec.vector.statistics import finite_ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from vllm_rvec.vector.encodings import Encoded
    from vllm_rvec.vector.reader import VectorReader

__all__ = ["CHOICES", "EncodingCost", "encoding_costs", "tensors_of"]

CHOICES: Final = tuple(
    Choice(encoding, dtype, rank)
    for encoding, rank in (
        ("dense", 16),
        ("sparse", 16),
        ("int8", 16),
        ("lowrank", 16),
        ("lowrank", 64),
        ("auto", 16),
    )
    for dtype in (torch.float32, torch.bfloat16)
    if encoding != "int8" or dtype == torch.float32  # int8 has no other scales
)
"""What is compared."""


@dataclass(slots=True)
class EncodingCost:
    """One choice for all tensors."""

    choice: Choice
    size_bytes: int = 0
    """Of all parts, without headers."""
    dense_bytes: dict[str, int] = field(default_factory=lambda: {"F32": 0, "BF16": 0})
    """What all tensors take as they are, by dtype."""
    stored: Counter[str] = field(default_factory=Counter)
    """Tensors by the encoding that they really get: lowrank is for matrices only, and what is
    all zero is always `zero`."""
    worst: float = 0.0
    """The largest relative Frobenius error of one tensor."""
    worst_tensor: str | None = None
    _squared_norm: float = 0.0
    _squared_error: float = 0.0

    @property
    def name(self) -> str:
        """What is chosen, in words: `lowrank 16 F32`."""
        rank = f" {self.choice.rank}" if self.choice.encoding == "lowrank" else ""
        return f"{self.choice.encoding}{rank} {DTYPE_NAMES[self.choice.dtype]}"

    @property
    def error(self) -> float | None:
        """Relative Frobenius error of all tensors together; None where it is not finite."""
        if self._squared_norm == 0:
            return 0.0
        ratio = finite_ratio(self._squared_error, self._squared_norm)
        return None if ratio is None else ratio**0.5

    def ratio(self, dtype: str) -> float | None:
        """Return the size over that of the same tensors, dense in F32 or BF16."""
        return finite_ratio(self.size_bytes, self.dense_bytes[dtype])

    def add(self, name: str, source: Source, encoded: Encoded, squared_norm: float) -> None:
        """Take one tensor into account."""
        self.size_bytes += size_bytes(encoded.parts)
        self.dense_bytes["F32"] += source.elements * 4
        self.dense_bytes["BF16"] += source.elements * 2
        self.stored[encoded.encoding] += 1
        self._squared_norm += squared_norm
        self._squared_error += encoded.squared_error
        error = (finite_ratio(encoded.squared_error, squared_norm) or 0.0) ** 0.5
        if error > self.worst:
            self.worst, self.worst_tensor = error, name


def encoding_costs(
    tensors: Iterable[tuple[str, torch.Tensor]], choices: tuple[Choice, ...] = CHOICES
) -> list[EncodingCost]:
    """Encode every tensor in every way, one tensor in memory at a time.

    Args:
        tensors: Names and tensors, float32, bfloat16 or float16.
        choices: What to compare.

    Returns:
        One for each choice. Errors are against the tensors given: those of a stored vector that is
        lossy itself say nothing of what it lost before.

    Raises:
        VectorCorruptError: A tensor holds NaN or infinity.
    """
    costs = [EncodingCost(choice) for choice in choices]
    for name, tensor in tensors:
        source = Source.of(tensor)
        measures = {choice.dtype: measure(source, choice.dtype) for choice in choices}
        for cost in costs:
            found = measures[cost.choice.dtype]
            encoded = _encoded(name, source, cost.choice, found)
            cost.add(name, source, encoded, found.squared_norm)
    return costs


def tensors_of(
    vector: VectorReader, on_progress: Callable[[int, int], None] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Decode a vector's tensors one after the other, without those that are zero already.

    Args:
        vector: The stored vector.
        on_progress: Called after each tensor with the weights done and the weights in all.
    """
    entries = vector.manifest.tensors
    total, done = sum(entry.elements for entry in entries.values()), 0
    for name, entry in entries.items():
        tensor = vector.tensor(name)
        if tensor is not None:
            yield name, tensor
            vector.release(name)
        done += entry.elements
        if on_progress is not None:
            on_progress(done, total)


def _encoded(name: str, source: Source, choice: Choice, measures: Measures) -> Encoded:
    try:
        if measures.is_finite:
            return encode(source, choice, measures)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        pass  # numbers so large that their products are infinite
    raise VectorCorruptError(
        f"tensor {name!r} of the vector can't be stored as {choice.encoding}",
        why="it holds NaN or infinity, or numbers too large for the dtype",
        fix="`vllm-rvec verify` tells what is damaged; copy or download the whole folder again",
        tensor_name=name,
    )
