"""Whether vectors have one structure, tokenizer and base, so that their sum means something.

Imports no torch. What a manifest leaves open (null, empty) is not compared.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from vllm_rvec.errors import IncompatibleVectorError
from vllm_rvec.vector.compatibility.lineage import LineageProbe
from vllm_rvec.vector.compatibility.report import Verdict
from vllm_rvec.vector.names import plain_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm_rvec.vector.manifest import Manifest

__all__ = ["check_agreement", "disagreements"]

logger = logging.getLogger(__name__)


def check_agreement(vectors: Sequence[tuple[str, Manifest]]) -> None:
    """Make sure that vectors can be added to each other.

    Args:
        vectors: Each with what it is called.

    Raises:
        IncompatibleVectorError: They can't; all mismatches at once.
    """
    if problems := disagreements(vectors):
        raise IncompatibleVectorError(
            "the vectors can't be added to each other",
            problems=problems,
            why="a sum is only defined tensor by tensor, for one architecture, one set of tokens "
            "and one pretrained initialisation",
            fix="combine vectors whose donors come from one base",
        )


def disagreements(vectors: Sequence[tuple[str, Manifest]]) -> list[str]:
    """Say where vectors don't agree, one line each; see `check_agreement`."""
    return [
        *_facts(vectors),
        *_names(vectors),
        *_shapes(vectors),
        *_tokens(vectors),
        *_lineages(vectors),
    ]


def _facts(vectors: Sequence[tuple[str, Manifest]]) -> Iterator[str]:
    first_id, first = vectors[0]
    ours = _model(first)
    for other_id, other in vectors[1:]:
        for what, theirs in _model(other).items():
            if ours[what] and theirs and ours[what] != theirs:
                yield f"{other_id}: {what} {theirs}, {first_id}: {ours[what]}"


def _model(manifest: Manifest) -> dict[str, str]:
    """Say in words what must be equal; empty where the manifest does not know."""
    rows = manifest.vocabulary.tuned_rows, manifest.vocabulary.base_rows
    has_rows = None not in rows
    tied = "tied" if manifest.tie_word_embeddings else "untied"
    return {
        "architecture": manifest.architecture,
        "model type": manifest.model_type,
        # An adapter without its base says nothing of either.
        "output head": tied if manifest.architecture else "",
        "vocabulary": (
            f"{manifest.vocabulary.policy} of {rows[0]} tuned and {rows[1]} base rows"
            if has_rows
            else ""
        ),
    }


def _names(vectors: Sequence[tuple[str, Manifest]]) -> Iterator[str]:
    """Name tensors that a vector should have, or should not.

    A complete vector has all; an incomplete one says nothing of the others, and adds nothing.
    """
    complete = [(each, manifest) for each, manifest in vectors if manifest.complete]
    if complete:
        whole_id, whole = complete[0]
        for each, manifest in vectors:
            for name in sorted(manifest.tensors.keys() - whole.tensors.keys()):
                yield f"{name}: in {each}, not in {whole_id}"
            for name in sorted(whole.tensors.keys() - manifest.tensors.keys()):
                if manifest.complete:
                    yield f"{name}: in {whole_id}, not in {each}"
        return
    names: dict[str, str] = {}
    for each, manifest in vectors:
        for name in sorted(manifest.tensors):
            if names.setdefault(plain_name(name), name) != name:
                yield f"{name} in {each} is {names[plain_name(name)]} in another"


def _shapes(vectors: Sequence[tuple[str, Manifest]]) -> Iterator[str]:
    seen: dict[str, tuple[str, tuple[int, ...]]] = {}
    for each, manifest in vectors:
        for name, entry in sorted(manifest.tensors.items()):
            whose, shape = seen.setdefault(name, (each, entry.shape))
            if shape != entry.shape:
                yield f"{name}: shape {list(entry.shape)} in {each}, {list(shape)} in {whose}"


def _tokens(vectors: Sequence[tuple[str, Manifest]]) -> Iterator[str]:
    known = [(each, m.tokenizer) for each, m in vectors if m.tokenizer is not None]
    for each, tokenizer in known[1:]:
        first_id, first = known[0]
        if tokenizer.packed_hashes != first.packed_hashes:
            yield f"{each}: other tokens for the same ids than {first_id}"


def _lineages(vectors: Sequence[tuple[str, Manifest]]) -> Iterator[str]:
    known = [(each, manifest) for each, manifest in vectors if manifest.sketch is not None]
    for each, manifest in known[1:]:
        first_id, first = known[0]
        if manifest.sketch is None or manifest.sketch == first.sketch:
            continue
        probe = LineageProbe(first)
        for name in manifest.sketch.tensors:
            probe.add(name, np.frombuffer(manifest.sketch.packed_samples(name), "<f4"))
        level = probe.level()
        for line in level.texts(Verdict.WARN):
            logger.warning("base donors of %s and %s: %s", first_id, each, line)
        for line in level.texts(Verdict.REFUSE):
            yield f"{each}: its base donor is not that of {first_id}: {line}"
