"""Merge to disk: a target checkpoint with vectors added, as a plain Hugging Face checkpoint.

The output has the target's own files with the target's own headers; only the bytes of tensors to
which something is added differ. They are those that the loader computes in memory, bit for bit,
where vLLM keeps a parameter in the dtype of the checkpoint (or a narrower one of float32): a sum
is rounded once, here to the file's dtype, there to the parameter's.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_rvec.checkpoint.companions import MODEL_CARD, find_companions
from vllm_rvec.checkpoint.digest import file_digest
from vllm_rvec.checkpoint.fetch import Located
from vllm_rvec.checkpoint.output import new_folder, write_durably
from vllm_rvec.checkpoint.table import read_table
from vllm_rvec.errors import ConfigError
from vllm_rvec.vector.addend import Addend
from vllm_rvec.vector.alpha import alpha_problem
from vllm_rvec.vector.compatibility.check import check_target
from vllm_rvec.vector.compatibility.report import Verdict
from vllm_rvec.vector.manifest import MANIFEST_NAME
from vllm_rvec.vector.merged_card import Ingredient, merged_card
from vllm_rvec.vector.merged_shards import ShardMerger
from vllm_rvec.vector.reader import VectorReader
from vllm_rvec.vector.verification import verify
from vllm_rvec.vector.writer import TOOL, now

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from vllm_rvec.checkpoint.companions import Companions
    from vllm_rvec.vector.recipe import RecipeVector

__all__ = ["Merge", "merge"]

logger = logging.getLogger(__name__)

SHOWN_FINDINGS = 8
"""Of one verdict: a forced merge may have hundreds."""


@dataclass(frozen=True, slots=True)
class Merge:
    """What `merge` made."""

    output: Path
    """The checkpoint's folder."""
    ingredients: tuple[Ingredient, ...]
    """The vectors, in the order of adding."""
    tensors: int
    """How many the checkpoint has."""
    changed_tensors: int
    """To how many of them anything was added."""
    changed_weights: int
    """How many weights those have."""
    size_bytes: int
    """What the shards take on disk."""
    companions: Companions
    """The target's other files."""


def merge(
    target: Path | Located,
    vectors: Sequence[Path | Located],
    output: Path,
    *,
    alphas: Sequence[float] = (),
    recipe: Sequence[RecipeVector] = (),
    vocabulary: str = "strict",
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Merge:
    """Write a target with vectors added to a new folder.

    Memory does not grow with the model, but for vectors that are not dense: a decoded tensor of
    each is in memory as a whole.

    Args:
        target: The checkpoint that is added to.
        vectors: What is added, in this order; `arithmetic.fuse_all` says why order matters.
        output: The new checkpoint's folder, which must not exist.
        alphas: One coefficient for each vector; 1 for all where none is given.
        recipe: For each vector, where in the model it is added and how much of it, which its alpha
            multiplies; all of each where none is given. Paths in it are not looked at.
        vocabulary: What to do where vector and target have different numbers of embedding rows:
            strict, common, skip-embeddings.
        force: Go on where the compatibility check refuses, and log what it found. A tensor that
            does not fit stays the target's.
        on_progress: Called with the bytes written and the bytes in all.

    Returns:
        What was made, in numbers.

    Raises:
        ConfigError: Vectors and alphas differ in number, an alpha is no number of float32, the
            recipe does not fit a vector, the output exists or can't be written, or the sum is
            beyond the range of the target's dtype; then all such tensors are named.
        CheckpointError: The target can't be read.
        VectorFormatError: A vector is none that this version reads.
        VectorCorruptError: A vector is damaged. It is verified first, once: see `verification`.
        IncompatibleVectorError: A vector does not belong to the target.
    """
    located = Located.of(target)
    table = read_table(located.folder)
    opened = [
        _Vector(VectorReader(where.folder), where, alpha, said)
        for where, alpha, said in zip(
            map(Located.of, vectors),
            _checked_alphas(vectors, alphas),
            recipe or (None,) * len(vectors),
            strict=True,
        )
    ]
    for vector in opened:
        verify(vector.reader)
        _check(vector, located, vocabulary, force=force)
    merger = ShardMerger(table, [vector.addend(vocabulary) for vector in opened], on_progress)
    with new_folder(output) as folder:
        merger.write(folder)
        _check_finite(merger.spoilt)
        companions = find_companions(located.folder, {info.shard for info in table.values()})
        for path in companions.carried:
            write_durably(folder / path.name, path.read_bytes())
        ingredients = tuple(vector.ingredient() for vector in opened)
        card = merged_card(output.name, located, ingredients, vocabulary, created=now(), tool=TOOL)
        write_durably(folder / MODEL_CARD, card.encode())
    return Merge(
        output=output,
        ingredients=ingredients,
        tensors=len(table),
        changed_tensors=len(merger.changed),
        changed_weights=sum(math.prod(table[name].shape) for name in merger.changed),
        size_bytes=merger.total_bytes,
        companions=companions,
    )


@dataclass(frozen=True, slots=True)
class _Vector:
    """One vector, opened."""

    reader: VectorReader
    located: Located
    alpha: float
    recipe: RecipeVector | None

    def addend(self, vocabulary: str) -> Addend:
        return Addend.of(self.reader, self.alpha, vocabulary, self.recipe)

    def ingredient(self) -> Ingredient:
        digest = file_digest(self.reader.folder / MANIFEST_NAME)
        return Ingredient(self.located, self.alpha, self.reader.manifest, digest, self.recipe)


def _checked_alphas(vectors: Sequence[object], alphas: Sequence[float]) -> list[float]:
    found = list(alphas) or [1.0] * len(vectors)
    if not vectors or len(found) != len(vectors):
        raise ConfigError(
            f"{len(vectors)} vectors and {len(alphas)} alphas",
            why="every vector is added with an alpha of its own, in the order given",
            fix="give --alpha once for each --vector; without any, each alpha is 1",
        )
    if problems := [f"alpha {alpha} {why}" for alpha in found if (why := alpha_problem(alpha))]:
        raise ConfigError(
            "an alpha can't be used", problems=problems, why="the formula takes it in float32"
        )
    return found


def _check(vector: _Vector, target: Located, vocabulary: str, *, force: bool) -> None:
    """Refuse a vector that does not belong to the target, or log why it is added all the same."""
    report = check_target(vector.reader, target.folder, vocabulary=vocabulary, recipe=vector.recipe)
    report.raise_if_refused(force)
    for verdict in (Verdict.REFUSE, Verdict.WARN):
        lines = list(report.lines(verdict))
        for line in lines[:SHOWN_FINDINGS]:
            logger.warning("%s: %s", vector.located.id, line)
        if (hidden := len(lines) - SHOWN_FINDINGS) > 0:
            logger.warning(
                "%s: ... and %d more: `vllm-rvec check` has all", vector.located.id, hidden
            )


def _check_finite(spoilt: Sequence[str]) -> None:
    if spoilt:
        raise ConfigError(
            f"the sum is not finite in {len(spoilt)} tensors",
            problems=spoilt,
            why="it is beyond the range of the target's dtype; one such weight spoils every answer",
            fix="use a smaller alpha, or a target in a dtype of wider range",
            tensor_name=spoilt[0],
        )
