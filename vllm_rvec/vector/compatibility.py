"""Whether a vector belongs to a target: names, shapes, dtypes, architecture. Imports no torch.

The same check runs twice: by `serve` on the headers of both, before any engine is started, and by
the loader on the tensors that really streamed by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_rvec.errors import IncompatibleVectorError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vllm_rvec.vector.manifest import Manifest

__all__ = ["FUSABLE_DTYPES", "check_architecture", "check_tensors"]

FUSABLE_DTYPES = ("F32", "BF16", "F16")
"""Target dtypes, in safetensors' words, that a vector can be added to."""

DERIVED_SUFFIXES = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "rotary_emb.cos_cached")
"""Buffers that old checkpoints carry though every engine computes them itself."""

OUTPUT_HEAD = "lm_head.weight"


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
        if theirs is not None and ours != theirs
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
    is_tied: bool,
    quantized: Iterable[str] = (),
) -> None:
    """Refuse a vector that does not cover the target tensor for tensor.

    Args:
        manifest: The vector's manifest.
        shapes: Every tensor of the target with its shape.
        target: The target's path or id, for the message.
        is_tied: Whether the target's output head is its embedding.
        quantized: Names of target tensors of a dtype that nothing can be added to.

    Raises:
        IncompatibleVectorError: A vector tensor that the target lacks, a target tensor that the
            vector does not cover, or shapes that differ: all of them at once.
    """
    ours = manifest.tensors
    ignorable = {OUTPUT_HEAD} if is_tied and manifest.tie_word_embeddings else set()
    problems = [
        f"{name}: in the vector, the target has no such tensor"
        for name in sorted(ours.keys() - shapes.keys() - ignorable)
    ]
    problems += [
        f"{name}: in the target, the vector does not cover it"
        for name in sorted(shapes.keys() - ours.keys() - ignorable)
        if not name.endswith(DERIVED_SUFFIXES)
    ]
    problems += [
        f"{name}: shape {list(ours[name].shape)} in the vector, {list(shapes[name])} in the target"
        for name in sorted(ours.keys() & shapes.keys())
        if ours[name].shape != tuple(shapes[name])
    ]
    problems += [
        f"{name}: the target's tensor is quantized, nothing can be added to it"
        for name in sorted(quantized)
        if name in ours and ours[name].encoding != "zero"
    ]
    if problems:
        raise IncompatibleVectorError(
            f"the vector does not fit {target}: {len(problems)} tensors don't match",
            problems=problems,
            why="every tensor must be in both, with one shape, or the sum is not the formula's",
            fix="use a vector made from donors of exactly this architecture, vocabulary and size",
        )
