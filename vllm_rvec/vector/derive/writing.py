"""Write a derived vector: what all commands that make one vector from others have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from vllm_rvec.arithmetic import is_finite, single_threaded_kernels
from vllm_rvec.checkpoint.dtypes import TORCH_DTYPES
from vllm_rvec.checkpoint.output import new_folder
from vllm_rvec.errors import ConfigError
from vllm_rvec.vector.encodings import Choice, Encoded, Source, encode, measure
from vllm_rvec.vector.extract import stored_dtype
from vllm_rvec.vector.manifest import Manifest, Step, TensorEntry
from vllm_rvec.vector.writer import TOOL, VectorWriter, now, write_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from vllm_rvec.vector.derive.inputs import VectorInput

__all__ = ["Derivation", "Kept", "Made", "Recipe", "Storage", "write_derived"]


@dataclass(frozen=True, slots=True)
class Storage:
    """How the results are stored.

    Raises:
        ConfigError: A choice has no such name.
    """

    encoding: str = "auto"
    """One of `ENCODING_CHOICES`."""
    dtype: str | None = None
    """float32, bfloat16 or float16; None for the narrowest that loses nothing: the input's own
    where it holds every result exactly, else float32."""
    rank: int = 16
    """Of lowrank."""

    def __post_init__(self) -> None:
        Choice(self.encoding, rank=self.rank)
        if self.dtype is not None:
            stored_dtype(self.dtype)

    def choice(self, result: torch.Tensor, input_dtype: str) -> Choice:
        """Choose for one tensor.

        Args:
            result: The tensor.
            input_dtype: What the input's tensor decodes to, in safetensors' words.
        """
        if self.dtype is not None:
            return Choice(self.encoding, stored_dtype(self.dtype), self.rank)
        own = TORCH_DTYPES[input_dtype]
        dtype = own if own.is_floating_point and _is_exact(result, own) else torch.float32
        return Choice(self.encoding, dtype, self.rank)

    def parameters(self) -> dict[str, str]:
        """Return what was asked for, for the lineage."""
        asked = {} if self.encoding == "auto" else {"encoding": self.encoding}
        if self.encoding == "lowrank":
            asked["rank"] = str(self.rank)
        return asked if self.dtype is None else asked | {"dtype": self.dtype}


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor that stays in its input's encoding."""

    encoded: Encoded
    """Its parts; `squared_norm` is that of what they decode to."""
    changed: int | None
    """As the input's entry says."""


Made: TypeAlias = torch.Tensor | Kept | None
"""A result: to be encoded, kept as it is encoded, or all zero."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A derived vector before it is made."""

    operation: str
    """The command."""
    parameters: Mapping[str, str]
    """What it was told."""
    inputs: Sequence[VectorInput]
    """What it reads."""
    outline: Manifest
    """The result's manifest, with the inputs' own tensors and lineage."""
    storage: Storage
    make: Callable[[str], Made]
    """Computes one tensor."""

    def step(self) -> Step:
        """Return what is added to the lineage."""
        return Step(
            operation=self.operation,
            parameters={**self.parameters, **self.storage.parameters()},
            inputs=tuple(one.digest for one in self.inputs),
            created=now(),
            tool=TOOL,
        )


@dataclass(frozen=True, slots=True)
class Derivation:
    """What was made."""

    output: Path
    """The vector's folder."""
    manifest: Manifest
    """Its manifest."""
    inputs: tuple[Manifest, ...]
    """Those of the vectors that were read."""

    @property
    def step(self) -> Step:
        """What was done."""
        return self.manifest.lineage[-1]

    @property
    def size_bytes(self) -> int:
        """What the shards take on disk."""
        return self.manifest.size_bytes


def write_derived(
    output: Path, recipe: Recipe, on_progress: Callable[[int, int], None] | None
) -> Derivation:
    """Make a vector from others, whole or not at all.

    Args:
        output: Its folder, which must not exist.
        recipe: What to make.
        on_progress: Called after each tensor with the weights done and the weights in all.

    Raises:
        ConfigError: The output exists or can't be written, or a result overflows its dtype.
        VectorCorruptError: An input is damaged.
    """
    with new_folder(output) as folder:
        for one in recipe.inputs:
            one.check_data()
        manifest = _write_tensors(folder, recipe, on_progress)
        write_manifest(folder, manifest)
    return Derivation(output, manifest, tuple(one.manifest for one in recipe.inputs))


def _write_tensors(
    folder: Path, recipe: Recipe, on_progress: Callable[[int, int], None] | None
) -> Manifest:
    """Write the shards, and describe them."""
    entries, names = recipe.outline.tensors, _in_order(recipe)
    total = sum(entry.elements for entry in entries.values())
    done = 0
    shapes = {name: entries[name].shape for name in names}
    with single_threaded_kernels(), VectorWriter(folder, shapes) as writer:
        for name in names:
            _add(writer, name, entries[name], recipe)
            for one in recipe.inputs:
                one.release(name)
            done += entries[name].elements
            if on_progress is not None:
                on_progress(done, total)
        files = writer.finish()
    return recipe.outline.model_copy(
        update={
            "tensors": dict(sorted(writer.entries.items())),
            "files": files,
            "roundtrip": None,
            "lineage": (*recipe.outline.lineage, recipe.step()),
            "created": now(),
            "tool": TOOL,
            "digest": "",
        }
    )


def _in_order(recipe: Recipe) -> list[str]:
    """Return every name once, as the inputs' files hold them."""
    read: Iterable[str] = (n for one in recipe.inputs for n in one.names_in_file_order())
    return list(dict.fromkeys(name for name in read if name in recipe.outline.tensors))


def _add(writer: VectorWriter, name: str, entry: TensorEntry, recipe: Recipe) -> None:
    made = recipe.make(name)
    if made is None:
        writer.add(
            name, entry.shape, Encoded("zero", entry.dtype), base_norm=entry.base_norm, changed=0
        )
        return
    if isinstance(made, Kept):
        writer.add(
            name,
            entry.shape,
            made.encoded,
            squared_norm=made.encoded.squared_norm,
            base_norm=entry.base_norm,
            changed=made.changed,
        )
        return
    source, choice = Source.of(made), recipe.storage.choice(made, entry.dtype)
    measures = measure(source, choice.dtype)
    if not measures.is_finite:
        raise _overflow(name, made, choice.dtype)
    writer.add(
        name,
        entry.shape,
        encode(source, choice, measures),
        squared_norm=measures.squared_norm,
        base_norm=entry.base_norm,
        changed=measures.changed,
    )


def _is_exact(result: torch.Tensor, dtype: torch.dtype) -> bool:
    if result.dtype == dtype:
        return True
    return all(torch.equal(block.to(dtype).float(), block) for block in Source.of(result).blocks())


def _overflow(name: str, result: torch.Tensor, dtype: torch.dtype) -> ConfigError:
    is_stored_only = is_finite(result)
    return ConfigError(
        f"tensor {name!r} of the result is not finite",
        why=f"it overflows {dtype if is_stored_only else torch.float32}",
        fix="store it with --dtype float32" if is_stored_only else "use smaller factors",
        tensor_name=name,
    )
