"""Whether a vector fits a target tensor for tensor: architecture, names, shapes, vocabulary.

Imports no torch. The same check runs three times: by `check` and `serve` on the headers of both,
and by the loader on the tensors that really streamed by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Literal, get_args

from vllm_rvec.errors import ConfigError
from vllm_rvec.vector.compatibility.report import (
    Finding,
    Level,
    Verdict,
    passed,
    refused,
    warned,
    worst,
)
from vllm_rvec.vector.names import (
    DERIVED_SUFFIXES,
    by_plain_name,
    embedding_among,
    is_output_head,
    is_vocabulary,
    plain_name,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from vllm_rvec.vector.manifest import Manifest

__all__ = [
    "VOCABULARY_POLICIES",
    "Pairing",
    "Vocabulary",
    "architecture_findings",
    "is_for_language_part",
    "parts_without_tensor",
    "structure_level",
    "tensor_findings",
    "tensor_problems",
]

Vocabulary = Literal["strict", "common", "skip-embeddings"]
VOCABULARY_POLICIES: Final = get_args(Vocabulary)
"""What to do where vector and target have different numbers of embedding rows. strict: refuse.
common: add the rows that both have. skip-embeddings: add nothing to embedding and output head,
whatever their sizes."""

LANGUAGE_TYPES: Final = {
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
"""Types of multimodal models, or of their language parts, that have the tensors of a language model
of another type."""


class Pairing:
    """Which of a vector's tensors is added to which of a target's.

    Args:
        manifest: The vector's manifest.
        vocabulary: One of `VOCABULARY_POLICIES`.
        only: Those of the vector's tensors that are added at all; all where None.
        is_partial: Whether the target is a multimodal model and the vector is for its language
            part: then it need not cover the other parts.

    Raises:
        ConfigError: There is no such policy.
    """

    def __init__(
        self,
        manifest: Manifest,
        vocabulary: str = "strict",
        *,
        only: Collection[str] | None = None,
        is_partial: bool = False,
    ) -> None:
        if vocabulary not in VOCABULARY_POLICIES:
            raise ConfigError(
                f"vocabulary policy {vocabulary!r}: choose one of {', '.join(VOCABULARY_POLICIES)}"
            )
        self.manifest = manifest
        self.vocabulary = vocabulary
        self._only = only
        self._plain = by_plain_name(manifest.tensors)
        self._stems = {_stem(name) for name in manifest.tensors} if is_partial else None

    def part_for(self, name: str) -> str | None:
        """Name the vector's tensor that belongs to a target's tensor.

        That is the tensor of the same name, whatever `model.` or `language_model.` stands before
        it. Donors with tied embeddings have no output head of their own; then the head's part is
        the embedding's. A target of that family may well store its head a second time, and vLLM
        then loads it as a matrix of its own.

        Returns:
            A name in the manifest, or None where the vector does not cover the target's tensor.
        """
        if name in self.manifest.tensors:
            return name
        if (part := self._plain.get(plain_name(name))) is not None:
            return part
        if is_output_head(name) and self.manifest.tie_word_embeddings:
            return embedding_among(self.manifest.tensors)
        return None

    def must_cover(self, name: str) -> bool:
        """Tell whether a target's tensor has to have a part, as all have of a complete vector."""
        if not self.manifest.complete or self.is_skipped(name) or is_derived(name):
            return False
        return self._stems is None or _stem(name) in self._stems

    def is_skipped(self, name: str) -> bool:
        """Tell whether a target's tensor stays as it is because of policy or recipe."""
        return bool(self.reason_to_skip(name))

    def reason_to_skip(self, name: str) -> str:
        """Say whether policy or recipe leave a target's tensor as it is; empty where none does."""
        if self.vocabulary == "skip-embeddings" and is_vocabulary(name):
            return self.vocabulary
        if self._only is None or (part := self.part_for(name)) is None or part in self._only:
            return ""
        return "the recipe leaves it out"

    def fits(self, name: str, shape: tuple[int, ...]) -> bool:
        """Tell whether the vector's part for a target's tensor can be added to that shape."""
        part = self.part_for(name)
        if part is None:
            return False
        ours = self.manifest.tensors[part].shape
        may_differ = self.vocabulary == "common" and is_vocabulary(name)
        return ours == shape or (may_differ and bool(ours) and ours[1:] == shape[1:])


def architecture_findings(manifest: Manifest, config: Mapping[str, object]) -> list[Finding]:
    """Compare the donors' kind of model with a target's.

    Args:
        manifest: The vector's manifest. What it leaves empty is not compared.
        config: The target's config.json.
    """
    if is_for_language_part(manifest, config):
        return [
            warned(
                f"model type: the vector's donors have {manifest.model_type}, the language part of "
                f"the target's {config.get('model_type')}: nothing is added to its other parts"
            )
        ]
    facts = (
        ("model type", manifest.model_type, config.get("model_type")),
        ("architecture", manifest.architecture, _architecture(config)),
    )
    findings = []
    for what, ours, theirs in facts:
        if not ours or theirs is None:
            whose = "the target's configuration" if ours else "the vector's manifest"
            findings.append(warned(f"{what} is not compared: {whose} does not say"))
        elif ours == theirs:
            findings.append(passed(f"{what}: {ours}"))
        else:
            findings.append(
                refused(f"{what}: the vector's donors have {ours}, the target has {theirs}")
            )
    return findings


def is_for_language_part(manifest: Manifest, config: Mapping[str, object]) -> bool:
    """Tell whether a target is a multimodal model whose language part is of the donors' type.

    Args:
        manifest: The vector's manifest.
        config: The target's config.json.
    """
    ours, whole, part = manifest.model_type, config.get("model_type"), config.get("text_config")
    if not ours or ours == whole:
        return False
    kinds = [whole, part.get("model_type") if isinstance(part, Mapping) else None]
    return ours == kinds[1] or ours in {LANGUAGE_TYPES.get(str(kind)) for kind in kinds}


def tensor_findings(
    pairing: Pairing,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    is_tied: object = None,
    is_left_out: Callable[[str], bool] | None = None,
) -> list[Finding]:
    """Compare vector and target tensor for tensor.

    Args:
        pairing: The vector's manifest, and the vocabulary policy.
        shapes: Every tensor of the target with its shape.
        is_tied: `tie_word_embeddings` of the target's configuration, where it has it.
        is_left_out: Tells of tensors that the target has though they are not in `shapes`: experts
            of other ranks. One expert too many shows in the router's shape, which every rank reads.
    """
    problems = [
        *tensor_problems(pairing, shapes, is_left_out),
        *_head_is_shared(pairing, shapes, is_tied),
    ]
    return [
        *map(refused, problems),
        *map(warned, _rows_left(pairing, shapes)),
        *map(warned, _untied(pairing, shapes, is_tied)),
        *([] if problems else [passed(_coverage(pairing, shapes))]),
    ]


def structure_level(architecture: Iterable[Finding], tensors: Iterable[Finding]) -> Level:
    """Put findings on architecture and on tensors together."""
    kinds, found = tuple(architecture), tuple(tensors)
    count = sum(finding.verdict is Verdict.REFUSE for finding in found)
    parts = []
    if worst(finding.verdict for finding in kinds) is Verdict.REFUSE:
        parts.append("another architecture")
    if count:
        parts.append(f"{count} tensors don't match")
    summary = " and ".join(parts) or "architecture, names and shapes match"
    return Level("structure", summary, (*kinds, *found), {"mismatched_tensors": count})


def tensor_problems(
    pairing: Pairing,
    shapes: Mapping[str, tuple[int, ...]],
    is_left_out: Callable[[str], bool] | None = None,
) -> list[str]:
    """Say where vector and target don't match tensor for tensor; as `tensor_findings`."""
    return [
        *_not_in_target(pairing, shapes, is_left_out),
        *_not_covered(pairing, shapes),
        *_taken_twice(pairing, shapes),
        *_misshapen(pairing, shapes),
    ]


def parts_without_tensor(pairing: Pairing, names: Iterable[str]) -> list[str]:
    """List the vector's tensors that none of a target's takes, and that it should take.

    Args:
        pairing: The vector's manifest, and the vocabulary policy.
        names: Every tensor of the target.
    """
    manifest = pairing.manifest
    left = manifest.tensors.keys() - {pairing.part_for(name) for name in names}
    return sorted(
        name
        for name in left
        # A tied head that donors store a second time is the embedding's part again.
        if not (is_output_head(name) and manifest.tie_word_embeddings)
        and not pairing.is_skipped(name)
        and not is_derived(name)
    )


def _not_in_target(
    pairing: Pairing,
    shapes: Mapping[str, tuple[int, ...]],
    is_left_out: Callable[[str], bool] | None,
) -> Iterator[str]:
    for name in parts_without_tensor(pairing, shapes):
        if is_left_out is None or not is_left_out(name):
            yield f"{name}: in the vector, the target has no such tensor"


def _not_covered(pairing: Pairing, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name in sorted(shapes):
        if pairing.part_for(name) is None and pairing.must_cover(name):
            yield f"{name}: in the target, the vector does not cover it"


def _taken_twice(pairing: Pairing, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Say which tensors have one name but for what stands before it: only one can be meant."""
    takers: dict[str, str] = {}
    for name in sorted(shapes):
        part = pairing.part_for(name)
        if part is None or (is_output_head(name) and not is_output_head(part)):
            continue  # a tied head shares the embedding's part
        if (other := takers.setdefault(part, name)) != name:
            yield f"{name}: {other} is in the target too, and the vector has one tensor for both"


def _misshapen(pairing: Pairing, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name, shape in sorted(shapes.items()):
        part = pairing.part_for(name)
        if part is None or pairing.is_skipped(name) or pairing.fits(name, tuple(shape)):
            continue
        ours = list(pairing.manifest.tensors[part].shape)
        way_out = " (the vocabulary policy common adds the shared rows)"
        may_be_common = is_vocabulary(name) and ours[1:] == list(shape[1:])
        yield (
            f"{name}: shape {ours} in the vector, {list(shape)} in the target"
            + (way_out if may_be_common else "")
        )


def _rows_left(pairing: Pairing, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Say what the vocabulary policy leaves out."""
    for name, shape in sorted(shapes.items()):
        part = pairing.part_for(name)
        if part is None or not is_vocabulary(name):
            continue
        if pairing.is_skipped(name):
            yield f"{name}: nothing is added to it ({pairing.reason_to_skip(name)})"
        elif pairing.fits(name, tuple(shape)):
            rows = pairing.manifest.tensors[part].shape[0] if shape else 0
            if shape and rows < shape[0]:
                yield f"{name}: nothing is added to rows {rows} to {shape[0] - 1}"
            elif shape and rows > shape[0]:
                yield f"{name}: rows {shape[0]} to {rows - 1} of the vector are left out"


def _untied(
    pairing: Pairing, shapes: Mapping[str, tuple[int, ...]], is_tied: object
) -> Iterator[str]:
    if not pairing.manifest.tie_word_embeddings or is_tied is not False:
        return
    for name in filter(is_output_head, shapes):
        yield (
            f"{name}: the donors share it with the embedding, the target does not; it gets "
            "the embedding's part of the vector"
        )


def _head_is_shared(
    pairing: Pairing, shapes: Mapping[str, tuple[int, ...]], is_tied: object
) -> Iterator[str]:
    """Say that a tied target does not read the head that it stores; without one it is missing."""
    if is_tied is not True:
        return
    embedding = embedding_among(pairing.manifest.tensors)
    for name in filter(is_output_head, shapes):
        if not pairing.is_skipped(name) and pairing.part_for(name) not in {None, embedding}:
            yield (
                f"{name}: the vector has a part of its own for it, the target shares it with "
                "the embedding (tie_word_embeddings)"
            )


def _coverage(pairing: Pairing, shapes: Mapping[str, tuple[int, ...]]) -> str:
    covered = sum(pairing.part_for(n) is not None and not pairing.is_skipped(n) for n in shapes)
    return (
        f"names and shapes match; the vector covers {covered} of the target's {len(shapes)} tensors"
    )


def _architecture(config: Mapping[str, object]) -> object:
    architectures = config.get("architectures")
    return architectures[0] if isinstance(architectures, list) and architectures else None


def _stem(name: str) -> str:
    """Return what a plain name begins with: layers, embed_tokens, norm; vision_tower, visual."""
    return plain_name(name).partition(".")[0]


def is_derived(name: str) -> bool:
    """Tell whether a tensor is a buffer that every engine computes itself."""
    return name.endswith(DERIVED_SUFFIXES)
