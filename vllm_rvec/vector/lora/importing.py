"""Make a stored vector of a PEFT adapter: factors as they are, scaling in the manifest.

Base + 1 * v is what PEFT's `merge_and_unload` makes, but for the rounding of the sums. With the
base at hand the vector names every tensor of it; without, only those that the adapter changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vllm_rvec.arithmetic import difference
from vllm_rvec.checkpoint.digest import file_digest
from vllm_rvec.checkpoint.fetch import Located
from vllm_rvec.checkpoint.model_card import license_of
from vllm_rvec.checkpoint.output import new_folder
from vllm_rvec.checkpoint.table import FLOAT_DTYPES
from vllm_rvec.errors import CheckpointError, printable
from vllm_rvec.vector.compatibility.lineage import make_sketch
from vllm_rvec.vector.compatibility.tokenizer import fingerprint
from vllm_rvec.vector.donors import DonorReader, vocabulary_of
from vllm_rvec.vector.encodings import Choice, Encoded, Source, encode, measure
from vllm_rvec.vector.encodings.parts import in_memory
from vllm_rvec.vector.encodings.source import norm_of, row_blocks
from vllm_rvec.vector.layout import LORA_A, LORA_B
from vllm_rvec.vector.lora.adapter import ADAPTER_NAME, Adapter, Factors, Whole
from vllm_rvec.vector.lora.config import CONFIG_NAME
from vllm_rvec.vector.lora.matching import Change, match_base, match_nothing
from vllm_rvec.vector.manifest import Donor, Donors, Manifest, Sketch, Vocabulary
from vllm_rvec.vector.writer import TOOL, VectorWriter, now, write_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vllm_rvec.vector.manifest import StoredFile, TensorEntry

__all__ = ["LoraImport", "import_lora", "named_base"]

MAX_FLOAT32 = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class LoraImport:
    """What `import_lora` made."""

    output: Path
    """The vector's folder."""
    manifest: Manifest
    """Its manifest."""
    base: str
    """What the base is called."""
    ranks: tuple[int, ...]
    """The ranks that the factors have, each once."""
    scalings: tuple[float, ...]
    """What products are multiplied with, each once."""
    norm: float
    """The Frobenius norm of v."""
    relative_norm: float | None
    """That, over the base's; None without it."""
    size_bytes: int
    """What the shards take on disk."""


def import_lora(
    adapter: Path | Located,
    output: Path,
    *,
    base: Path | Located | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LoraImport:
    """Write a LoRA adapter as a vector to a new folder.

    Args:
        adapter: The folder that PEFT's `save_pretrained` wrote.
        output: The vector's folder, which must not exist.
        base: The checkpoint that the adapter was trained on. Without it, the folder that the
            adapter names, where there is one; else the vector is not `complete`.
        on_progress: Called after each tensor with the weights done and the weights in all.

    Returns:
        What was made, in numbers.

    Raises:
        CheckpointError: The adapter or the base can't be read, the adapter is not a plain LoRA,
            or it does not fit the base; all problems at once.
        ConfigError: The output exists or can't be written.
    """
    with new_folder(output) as folder:
        opened = Adapter(Located.of(adapter))
        found = Located.of(base) if base is not None else named_base(opened)
        if found is None:
            manifest = _Importer(opened, None, on_progress).write(folder)
        else:
            with DonorReader(found) as donor:
                manifest = _Importer(opened, donor, on_progress).write(folder)
        write_manifest(folder, manifest)
    return _summary(output, opened, manifest)


def named_base(adapter: Adapter) -> Located | None:
    """Find the base that an adapter names, if that is a checkpoint folder on this machine."""
    named = adapter.config.base_model_name_or_path
    if not named or "\0" in named or len(named) > 4096:
        return None
    folder = Path(named)
    try:
        return Located.local(folder) if (folder / "config.json").is_file() else None
    except OSError:
        return None


class _Importer:
    """The pass over all tensors."""

    def __init__(
        self,
        adapter: Adapter,
        base: DonorReader | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self.adapter, self.base, self.on_progress = adapter, base, on_progress
        matched = match_nothing(adapter) if base is None else match_base(adapter, base)
        if matched.problems:
            raise CheckpointError(
                f"the adapter {adapter.located.folder} can't be a vector",
                problems=sorted(matched.problems),
                why="a vector is what is added to the base's weights, and nothing but that",
                fix="check that --base is what it was trained on; or merge it by PEFT's "
                "merge_and_unload and save, then `vllm-rvec extract` the difference to the base",
                path=adapter.located.folder,
            )
        self.changes = matched.changes
        self.is_tied = matched.is_tied

    def write(self, folder: Path) -> Manifest:
        """Write the shards, and describe them."""
        total = sum(math.prod(change.shape) for change in self.changes) or 1
        done = 0
        # Factors are small, whatever they are the product of: the plan of shards goes by that.
        shapes = {change.name: change.stored_shape for change in self.changes}
        with VectorWriter(folder, shapes) as writer:
            for change in self.changes:
                self._write_tensor(writer, change)
                done += math.prod(change.shape)
                if self.on_progress is not None:
                    self.on_progress(done, total)
            return self._manifest(writer.finish(), writer.entries)

    def _manifest(self, files: dict[str, StoredFile], entries: dict[str, TensorEntry]) -> Manifest:
        base = self.base
        own_tokens = fingerprint(self.adapter.located.folder)
        return Manifest(
            formula="scaling * B @ A",
            complete=base is not None,
            donors=Donors(tuned=self._describe(), base=_describe_base(self.adapter, base)),
            architecture=base.architecture if base else "",
            model_type=base.model_type if base else "",
            tie_word_embeddings=self.is_tied,
            vocabulary=vocabulary_of(base, base, "strict") if base else Vocabulary(),
            tensors=dict(sorted(entries.items())),
            files=files,
            roundtrip=None,
            tokenizer=own_tokens or (fingerprint(base.folder) if base else None),
            sketch=self._sketch(base) if base else None,
            lineage=(),
            created=now(),
            tool=TOOL,
        )

    def _write_tensor(self, writer: VectorWriter, change: Change) -> None:
        theta = self.base.tensor(change.base) if self.base is not None else None
        base_norm = None
        if theta is not None and change.dtype in FLOAT_DTYPES:
            base_norm = math.hypot(*(norm_of(block.float()) for block in row_blocks(theta)))
        if isinstance(change.source, Factors):
            encoded = self._factored(change.source, is_transposed=change.is_transposed)
            writer.add(change.name, change.shape, encoded, base_norm=base_norm)
        elif isinstance(change.source, Whole) and theta is not None:
            source = _difference(change.shape, self.adapter.tensor(change.source), theta)
            self._write_difference(writer, change, source, base_norm)
        else:
            encoded = Encoded("zero", change.dtype)
            writer.add(change.name, change.shape, encoded, base_norm=base_norm, changed=0)
        if self.base is not None:
            self.base.reader.release(change.base)

    def _factored(self, factors: Factors, *, is_transposed: bool) -> Encoded:
        a, b = self.adapter.matrices(factors)
        if is_transposed:
            a, b = b.T, a.T  # (B A)^T = A^T B^T
        # The bound of `verify`, so that it takes every vector that is made here; NaN fails it too.
        bound = abs(factors.scaling) * factors.rank * _largest(a) * _largest(b)
        if not bound <= MAX_FLOAT32:
            raise CheckpointError(
                f"the factors of {factors.module!r} have no finite product",
                why="they hold NaN or infinity, or their product overflows float32",
                fix="check the adapter",
                path=self.adapter.located.folder,
                tensor_name=factors.name,
            )
        return Encoded(
            "lowrank",
            "F32",
            (in_memory(LORA_A, a.contiguous()), in_memory(LORA_B, b.contiguous())),
            scaling=factors.scaling,
            squared_norm=_squared_product_norm(a, b) * factors.scaling**2,
        )

    def _write_difference(
        self, writer: VectorWriter, change: Change, source: Source, base_norm: float | None
    ) -> None:
        choice = Choice("auto", torch.float32)
        measures = measure(source, choice.dtype)
        if not measures.is_finite:
            raise CheckpointError(
                f"the difference of {change.name!r} is not finite",
                why="the adapter or the base holds NaN or infinity there, or it overflows",
                fix="check both",
                path=self.adapter.located.folder,
                tensor_name=change.name,
            )
        encoded = encode(source, choice, measures)
        if measures.changed == 0:
            encoded = Encoded("zero", change.dtype)
        writer.add(
            change.name,
            change.shape,
            encoded,
            squared_norm=measures.squared_norm,
            base_norm=base_norm,
            changed=measures.changed,
        )

    def _describe(self) -> Donor:
        folder = self.adapter.located.folder
        return Donor(
            id=self.adapter.located.id,
            revision=self.adapter.located.revision,
            license=license_of(folder),
            files={name: file_digest(folder / name) for name in (CONFIG_NAME, ADAPTER_NAME)},
        )

    def _sketch(self, base: DonorReader) -> Sketch:
        floats = [change for change in self.changes if change.dtype in FLOAT_DTYPES]
        own_names = {change.name: change.base for change in floats}
        return make_sketch(
            {change.name: change.shape for change in floats},
            lambda name, positions: base.sample(own_names[name], positions),
        )


def _difference(shape: tuple[int, ...], tuned: torch.Tensor, base: torch.Tensor) -> Source:
    def blocks() -> Iterator[torch.Tensor]:
        sides = zip(row_blocks(tuned), row_blocks(base), strict=True)
        return (difference(*side) for side in sides)

    return Source(shape, blocks)


def _describe_base(adapter: Adapter, base: DonorReader | None) -> Donor:
    if base is not None:
        return base.describe()
    named = adapter.config.base_model_name_or_path or ""
    # An id on the Hub has one slash; anything else is a path on its maker's machine.
    is_id = named.count("/") <= 1 and not named.startswith(("/", ".", "~")) and "\\" not in named
    name = named if is_id else named.replace("\\", "/").rstrip("/").rpartition("/")[2]
    revision = adapter.config.revision
    return Donor(
        id=printable(name) or "unknown", revision=None if revision is None else printable(revision)
    )


def _largest(matrix: torch.Tensor) -> float:
    return float(matrix.abs().amax())


def _squared_product_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """Compute ||B A||_F^2 = <B^T B, A A^T> in float64, without the product itself."""
    wide_a, wide_b = a.double(), b.double()
    return max(0.0, float(((wide_b.T @ wide_b) * (wide_a @ wide_a.T)).sum()))


def _summary(output: Path, adapter: Adapter, manifest: Manifest) -> LoraImport:
    entries = manifest.tensors.values()
    norm = math.hypot(*(entry.norm for entry in entries))
    base_norm = math.hypot(*(entry.base_norm or 0.0 for entry in entries))
    return LoraImport(
        output=output,
        manifest=manifest,
        base=manifest.donors.base.id,
        ranks=tuple(sorted({factors.rank for factors in adapter.factors.values()})),
        scalings=tuple(sorted({factors.scaling for factors in adapter.factors.values()})),
        norm=norm,
        relative_norm=norm / base_norm if base_norm else None,
        size_bytes=manifest.size_bytes,
    )
