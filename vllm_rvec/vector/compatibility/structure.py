"""Whether a vector belongs to a target: names, shapes, dtypes, architecture. Imports no torch.

The same check runs twice: by `serve` on the headers of both, before any engine is started, and by
the loader on the tensors that really streamed by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_rvec.errors import IncompatibleVectorError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from vllm_rvec.vector.manifest import Manifest

__all__ = ["OUTPUT_HEAD", "check_architecture", "check_tensors", "part_for"]

DERIVED_SUFFIXES = (
    "rotary_emb.inv_freq",
    "rotary_pos_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
)
"""Buffers that old checkpoints carry though every engine computes them itself."""

OUTPUT_HEAD = "lm_head.weight"
EMBEDDING_SUFFIXES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")


def part_for(manifest: Manifest, name: str) -> str | None:
    """Name the vector's tensor that belongs to a target's tensor.

    That is the tensor of the same name. Donors with tied embeddings may store no output head, as
    theirs is the embedding; then the head's part is the embedding's. A target of that family may
    well store its head a second time, and vLLM then loads it as a matrix of its own.

    Returns:
        A name in the manifest, or None where the vector does not cover the target's tensor.
    """
    if name in manifest.tensors:
        return name
    if name == OUTPUT_HEAD and manifest.tie_word_embeddings:
        embeddings = [n for n in manifest.tensors if n.endswith(EMBEDDING_SUFFIXES)]
        return embeddings[0] if len(embeddings) == 1 else None
    return None


def check_architecture(manifest: Manifest, config: Mapping[str, object], *, target: str) -> None:
    """Refuse a vector whose donors are of another kind than the target.

    Args:
        manifest: The vector's manifest.
        config: The target's config.json.
        target: The target's path or id, for the message.

    Raises:
        IncompatibleVectorError: Model type or architecture differs.
    """
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    facts = (
        ("model type", manifest.model_type, config.get("model_type")),
        ("architecture", manifest.architecture, first),
    )
    problems = [
        f"{what}: the vector's donors have {ours}, the target has {theirs}"
        for what, ours, theirs in facts
        if ours and theirs is not None and ours != theirs
    ]
    if problems:
        raise IncompatibleVectorError(
            f"the vector does not belong to {target}",
            problems=problems,
            why="a reasoning vector is only defined for the architecture of its donors",
            fix="use a vector made from donors of the target's own family and size",
        )


def check_tensors(
    manifest: Manifest,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    target: str,
    quantized: Iterable[str] = (),
) -> None:
    """Refuse a vector that does not cover the target tensor for tensor.

    Args:
        manifest: The vector's manifest.
        shapes: Every tensor of the target with its shape.
        target: The target's path or id, for the message.
        quantized: Names of target tensors of a dtype that nothing can be added to.

    Raises:
        IncompatibleVectorError: A vector tensor that the target lacks, a target tensor that the
            vector does not cover, or shapes that differ: all of them at once.
    """
    problems = [
        *_not_in_target(manifest, shapes),
        *_not_covered(manifest, shapes),
        *_misshapen(manifest, shapes),
        *_not_addable(manifest, quantized),
    ]
    if problems:
        raise IncompatibleVectorError(
            f"the vector does not fit {target}: {len(problems)} tensors don't match",
            problems=problems,
            why="every tensor must be in both, with one shape, or the sum is not the formula's",
            fix="use a vector made from donors of exactly this architecture, vocabulary and size",
        )


def _not_in_target(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name in sorted(manifest.tensors.keys() - shapes.keys()):
        # A tied head that donors store a second time is the embedding's part again.
        is_tied_head = name == OUTPUT_HEAD and manifest.tie_word_embeddings
        if not is_tied_head and not name.endswith(DERIVED_SUFFIXES):
            yield f"{name}: in the vector, the target has no such tensor"


def _not_covered(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name in sorted(shapes):
        if part_for(manifest, name) is None and not name.endswith(DERIVED_SUFFIXES):
            yield f"{name}: in the target, the vector does not cover it"


def _misshapen(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name, shape in sorted(shapes.items()):
        part = part_for(manifest, name)
        if part is not None and manifest.tensors[part].shape != tuple(shape):
            ours = list(manifest.tensors[part].shape)
            yield f"{name}: shape {ours} in the vector, {list(shape)} in the target"


def _not_addable(manifest: Manifest, quantized: Iterable[str]) -> Iterator[str]:
    for name in sorted(quantized):
        part = part_for(manifest, name)
        if part is not None and manifest.tensors[part].encoding != "zero":
            yield f"{name}: the target's tensor is quantized, nothing can be added to it"
