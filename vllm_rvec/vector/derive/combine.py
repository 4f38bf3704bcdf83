"""Add stored vectors to each other: one vector, the weighted sum.

For each tensor the sum in float32, in the order given:

    ((float32(w1) * v1) + float32(w2) * v2) + ...

each product and each sum rounded to float32; a tensor that is zero in a vector, a weight of 0, and
a tensor that an incomplete vector does not name add nothing. Added to a target with alpha 1 the
result differs from adding the vectors one after another (`arithmetic.fuse_all`) in where sums are
rounded only: for k vectors by less than k * 2^-23 * (|theta| + the sum of |w * v|) in float32.

The float32 sum of one tensor is in memory at a time, and one vector's tensor as it is decoded:
below four times the largest tensor in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from vllm_rvec.errors import ConfigError
from vllm_rvec.vector.alpha import alpha_problem
from vllm_rvec.vector.derive.agreement import check_agreement
from vllm_rvec.vector.derive.inputs import VectorInput
from vllm_rvec.vector.derive.scaling import scaled
from vllm_rvec.vector.derive.writing import Made, Recipe, Storage, write_derived
from vllm_rvec.vector.encodings.source import row_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    import torch

    from vllm_rvec.checkpoint.fetch import Located
    from vllm_rvec.vector.derive.writing import Derivation
    from vllm_rvec.vector.manifest import Manifest, Step, TensorEntry

__all__ = ["Term", "combine"]

T = TypeVar("T")


class Term(NamedTuple):
    """One vector of a sum."""

    vector: Path | Located
    weight: float
    """What it is multiplied by; rounded to float32."""


def combine(
    terms: Sequence[Term],
    output: Path,
    *,
    encoding: str = "auto",
    dtype: str | None = None,
    rank: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> Derivation:
    """Write a weighted sum of vectors to a new folder.

    The result has the first vector's donors and formula. It is complete if one of the vectors is.

    Args:
        terms: The vectors in the order of adding, one or more.
        output: The new vector's folder, which must not exist.
        encoding: auto, dense, sparse, int8, lowrank.
        dtype: float32, bfloat16, float16; None for the inputs' where that is exact, else float32.
        rank: Of lowrank.
        on_progress: Called after each tensor with the weights done and the weights in all.

    Returns:
        What was made.

    Raises:
        ConfigError: No vector; a weight that is no number of float32; the output exists or can't
            be written; the sum overflows.
        IncompatibleVectorError: The vectors are not of one structure, tokenizer and base; all
            mismatches at once.
        VectorFormatError: An input is no vector that this version reads.
        VectorCorruptError: An input is damaged.
    """
    _check_weights(terms)
    storage = Storage(encoding, dtype, rank)
    addends = [_Addend(VectorInput(term.vector), float(np.float32(term.weight))) for term in terms]
    check_agreement(_called([addend.source for addend in addends]))
    recipe = Recipe(
        operation="combine",
        parameters={
            str(number): f"{addend.source.id}:{term.weight}"
            for number, (addend, term) in enumerate(zip(addends, terms, strict=True), 1)
        },
        inputs=[addend.source for addend in addends],
        outline=_outline([addend.source.manifest for addend in addends]),
        storage=storage,
        make=lambda name: _sum(addends, name),
    )
    return write_derived(output, recipe, on_progress)


@dataclass(frozen=True, slots=True)
class _Addend:
    """One vector, opened, and its weight as float32 holds it."""

    source: VectorInput
    weight: float


def _check_weights(terms: Sequence[Term]) -> None:
    if not terms:
        raise ConfigError(
            "nothing to combine", fix="give vectors with their weights: V1:0.7 V2:0.3"
        )
    if problems := [f"weight {t.weight} {why}" for t in terms if (why := alpha_problem(t.weight))]:
        raise ConfigError(
            "a weight can't be used", problems=problems, why="the sum takes it in float32"
        )


def _sum(addends: Sequence[_Addend], name: str) -> Made:
    total: torch.Tensor | None = None
    for addend in addends:
        v = addend.source.tensor(name) if addend.weight != 0 else None
        if v is None:
            continue
        if total is None:
            total = scaled(v, addend.weight)
            continue
        for block, part in zip(row_blocks(total), row_blocks(v), strict=True):
            block.add_(scaled(part, addend.weight))
    return total


def _outline(manifests: Sequence[Manifest]) -> Manifest:
    """Describe the sum: what the first vector says, and what it leaves open as the others say."""
    first = manifests[0]
    # An adapter that was imported without its base knows neither its head nor its rows.
    knowing = next((m for m in manifests if m.architecture), first)
    tensors: dict[str, list[TensorEntry]] = {}
    for manifest in manifests:
        for name, entry in manifest.tensors.items():
            tensors.setdefault(name, []).append(entry)
    return first.model_copy(
        update={
            "complete": any(manifest.complete for manifest in manifests),
            "architecture": _first_known(m.architecture for m in manifests) or "",
            "model_type": _first_known(m.model_type for m in manifests) or "",
            "tie_word_embeddings": knowing.tie_word_embeddings,
            "vocabulary": knowing.vocabulary,
            "tokenizer": _first_known(m.tokenizer for m in manifests),
            "sketch": _first_known(m.sketch for m in manifests),
            "lineage": _joined(manifests),
            "tensors": {name: _merged(entries) for name, entries in tensors.items()},
        }
    )


def _merged(entries: Sequence[TensorEntry]) -> TensorEntry:
    """Take the first entry that stores anything, with the first base norm that is known."""
    stored = next((entry for entry in entries if entry.encoding != "zero"), entries[0])
    base_norm = next((e.base_norm for e in entries if e.base_norm is not None), None)
    return stored.model_copy(update={"base_norm": base_norm})


def _joined(manifests: Sequence[Manifest]) -> tuple[Step, ...]:
    """Return all that was done to the vectors, each step once."""
    steps: list[Step] = []
    for manifest in manifests:
        steps += [step for step in manifest.lineage if step not in steps]
    return tuple(steps)


def _first_known(values: Iterable[T | None]) -> T | None:
    return next((value for value in values if value), None)


def _called(sources: list[VectorInput]) -> list[tuple[str, Manifest]]:
    """Call each by its id, or all by their folders where two folders have one name."""
    ids = [source.id for source in sources]
    if len(set(ids)) < len(ids):
        ids = [str(source.located.folder) for source in sources]
    return list(zip(ids, (source.manifest for source in sources), strict=True))
