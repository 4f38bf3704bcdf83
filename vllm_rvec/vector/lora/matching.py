"""Which tensor of the base each part of an adapter changes, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_rvec.arithmetic import FLOAT_DTYPES as FLOATS
from vllm_rvec.checkpoint.table import FLOAT_DTYPES
from vllm_rvec.vector.encodings.source import row_blocks
from vllm_rvec.vector.lora.adapter import Adapter, Factors, Whole
from vllm_rvec.vector.lora.config import CONV1D_MODEL_TYPES
from vllm_rvec.vector.names import OUTPUT_HEAD, embedding_among, is_vocabulary, plain_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vllm_rvec.vector.donors import DonorReader

__all__ = ["Change", "Matched", "is_conv1d", "match_base", "match_nothing"]

BARE_PREFIX = "transformer."
"""What GPT-2's kind has in place of `model.`."""


@dataclass(frozen=True, slots=True)
class Change:
    """One tensor of the vector."""

    name: str
    """As the vector calls it."""
    shape: tuple[int, ...]
    dtype: str
    """The base's, or F32 without one."""
    base: str = ""
    """The base's tensor."""
    source: Factors | Whole | None = None
    """What the adapter has for it; None where it stays as it is."""
    is_transposed: bool = False
    """The tensor is (B @ A)^T."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """A shape of as many numbers as are stored, of as many dimensions as the parts have."""
        match self.source:
            case Factors() as factors:
                return factors.rank, sum(factors.shape)
            case Whole():
                return self.shape
            case None:
                return (0,)


@dataclass(frozen=True, slots=True)
class Matched:
    """What `match_base` found."""

    changes: list[Change]
    """Every tensor of the vector, in the order of the base's files."""
    problems: list[str]
    is_tied: bool
    """The base's output head is its embedding."""


def match_nothing(adapter: Adapter) -> Matched:
    """List what an adapter changes where its base is not at hand."""
    problems = list(adapter.problems)
    problems += [
        f"{name}: trained as a whole (modules_to_save, a bias, an embedding); its difference needs "
        "the base: give --base"
        for name in adapter.whole
    ]
    changes = []
    for factors in adapter.factors.values():
        is_transposed = _is_transposed(adapter, factors, "")
        shape = _shape(factors, is_transposed=is_transposed)
        changes.append(Change(factors.name, shape, "F32", "", factors, is_transposed))
    return Matched(changes, problems, is_tied=False)


def match_base(adapter: Adapter, base: DonorReader) -> Matched:
    """Find the base's tensor for each part of an adapter.

    Returns:
        A change for every tensor of the base, most of them none; and all problems.
    """
    matcher = _Matcher(adapter, base)
    sources: dict[str, Factors | Whole] = {}
    problems = list(adapter.problems)
    parts: list[Factors | Whole] = [*adapter.factors.values(), *adapter.whole.values()]
    for part in parts:
        name = matcher.own_name(part)
        if isinstance(part, Whole) and matcher.is_copy(part):
            continue  # what PEFT saves beside an embedding's factors
        if problem := matcher.problem(part):
            problems.append(f"{part.name}: {problem}")
        elif name in sources:
            problems.append(f"{part.name}: factors, and a copy that is not the base's")
        elif name is not None:
            sources[name] = part
    return Matched(matcher.changes(sources), problems, matcher.is_tied)


def is_conv1d(model_type: str, name: str) -> bool:
    """Tell whether a model stores a linear weight as `[in, out]`."""
    return model_type in CONV1D_MODEL_TYPES and not is_vocabulary(name)


class _Matcher:
    """An adapter beside its base."""

    def __init__(self, adapter: Adapter, base: DonorReader) -> None:
        self.adapter, self.base = adapter, base
        self.table = base.reader.table
        self._own_names = _by_bare_name(self.table)
        self.is_tied = _is_tied(base)

    def own_name(self, part: Factors | Whole) -> str | None:
        """Name the base's tensor that a part of the adapter changes."""
        if self.is_tied and part.name == OUTPUT_HEAD:
            return None
        return self._own_names.get(_bare_name(part.name))

    def is_copy(self, whole: Whole) -> bool:
        """Tell whether a whole tensor is the base's own; a tied head is compared with its twin."""
        name = self.own_name(whole)
        if self.is_tied and whole.name == OUTPUT_HEAD:
            name = embedding_among(self.table)
            twin = next((w for w in self.adapter.whole.values() if self.own_name(w) == name), None)
            if twin is not None and self.adapter.config.ensure_weight_tying:
                return _is_equal(self.adapter.tensor(whole), self.adapter.tensor(twin))
        return name is not None and _is_equal(self.adapter.tensor(whole), self.base.tensor(name))

    def problem(self, part: Factors | Whole) -> str:
        """Say why a part can't be added to the base."""
        if self.is_tied and self._unties(part):
            return (
                "the base ties embedding and output head, and changing one of them alone makes "
                "another model; train on an untied base, or the embedding alone as one of "
                "modules_to_save with ensure_weight_tying"
            )
        if (name := self.own_name(part)) is None:
            return "the base has no such tensor"
        info = self.table[name]
        if info.dtype not in FLOAT_DTYPES:
            return f"the base's tensor is quantized ({info.dtype}), nothing can be added to it"
        shape = part.info.shape if isinstance(part, Whole) else self._shape(part)
        return "" if shape == info.shape else f"shape {list(shape)}, the base's {list(info.shape)}"

    def changes(self, sources: Mapping[str, Factors | Whole]) -> list[Change]:
        """List every tensor of the base, in the order of its files."""
        changes = []
        for name in sorted(self.table, key=self._place):
            info, source = self.table[name], sources.get(name)
            if self.is_tied and name == OUTPUT_HEAD:
                continue
            is_transposed = isinstance(source, Factors) and self._is_transposed(source)
            changes.append(Change(name, info.shape, info.dtype, name, source, is_transposed))
        return changes

    def _unties(self, part: Factors | Whole) -> bool:
        if part.name == OUTPUT_HEAD:
            return True
        is_embedding = self.own_name(part) == embedding_among(self.table)
        # PEFT merges an embedding's factors into the one tensor that both share.
        is_whole = isinstance(part, Whole)
        return is_embedding and is_whole and not self.adapter.config.ensure_weight_tying

    def _shape(self, factors: Factors) -> tuple[int, int]:
        return _shape(factors, is_transposed=self._is_transposed(factors))

    def _is_transposed(self, factors: Factors) -> bool:
        return _is_transposed(self.adapter, factors, self.base.model_type)

    def _place(self, name: str) -> tuple[object, int, str]:
        info = self.table[name]
        return info.shard, info.offset_bytes, name


def _is_transposed(adapter: Adapter, factors: Factors, model_type: str) -> bool:
    if factors.is_embedding or is_conv1d(model_type, factors.name):
        return True
    return adapter.config.fan_in_fan_out and factors.name != OUTPUT_HEAD


def _shape(factors: Factors, *, is_transposed: bool) -> tuple[int, int]:
    out, in_ = factors.shape
    return (in_, out) if is_transposed else (out, in_)


def _bare_name(name: str) -> str:
    return plain_name(name).removeprefix(BARE_PREFIX)


def _by_bare_name(names: Iterable[str]) -> Mapping[str, str]:
    own = list(names)
    bare = {_bare_name(name): name for name in own}
    return bare if len(bare) == len(own) else {name: name for name in own}


def _is_tied(base: DonorReader) -> bool:
    if OUTPUT_HEAD not in base.reader.table:
        return embedding_among(base.reader.table) is not None and not base.is_untied
    return base.config.get("tie_word_embeddings") is True


def _is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or other.dtype not in FLOATS:
        return False
    blocks = zip(row_blocks(one), row_blocks(other), strict=True)
    return all(torch.equal(a.float(), b.float()) for a, b in blocks)
