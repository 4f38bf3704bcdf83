"""Make a stored vector from two donors: v = tuned - base, tensor by tensor.

Memory does not grow with the model: the difference is computed in blocks, as often as its encoding
has to read it, and the pages of both donors are given back tensor by tensor.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from vllm_rvec.arithmetic import difference, single_threaded_kernels
from vllm_rvec.checkpoint.fetch import Located
from vllm_rvec.checkpoint.output import new_folder
from vllm_rvec.checkpoint.table import FLOAT_DTYPES
from vllm_rvec.errors import CheckpointError, ConfigError
from vllm_rvec.vector.compatibility.lineage import make_sketch
from vllm_rvec.vector.compatibility.tokenizer import fingerprint
from vllm_rvec.vector.donors import DonorReader, Pair, match_donors, vocabulary_of
from vllm_rvec.vector.encodings import Choice, Encoded, Measures, Source, encode
from vllm_rvec.vector.encodings.source import norm_of
from vllm_rvec.vector.manifest import Donors, Manifest, Roundtrip, Sketch, TensorEntry
from vllm_rvec.vector.names import OUTPUT_HEAD
from vllm_rvec.vector.roundtrip import RoundtripCount
from vllm_rvec.vector.scratch import Scratch
from vllm_rvec.vector.writer import TOOL, VectorWriter, now, write_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


__all__ = ["STORED_DTYPES", "VOCABULARY_POLICIES", "Extraction", "extract", "stored_dtype"]

STORED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What a vector can be stored as, by the name that a user writes."""

VOCABULARY_POLICIES = ("strict", "common")

LOSSY_ENCODINGS = {"int8", "lowrank"}

WORKERS = max(1, min(4, (os.cpu_count() or 1) - 1))
"""Tensors measured at a time, beside the one that is written. More wait for Python's lock."""


@dataclass(frozen=True, slots=True)
class Extraction:
    """What `extract` made."""

    output: Path
    """The vector's folder."""
    manifest: Manifest
    """Its manifest."""
    elements: int
    """How many weights the vector covers."""
    changed_elements: int
    """How many of them differ between the donors."""
    norm: float
    """The Frobenius norm of v, exact."""
    relative_norm: float
    """That, over the norm of the base donor."""
    error: float
    """Relative Frobenius error of what is stored; 0 if nothing was lost."""
    size_bytes: int
    """What the shards take on disk."""


def extract(
    tuned: Path | Located,
    base: Path | Located,
    output: Path,
    *,
    dtype: str = "float32",
    encoding: str = "auto",
    rank: int = 16,
    vocabulary: str = "strict",
    on_progress: Callable[[int, int], None] | None = None,
) -> Extraction:
    """Write v = tuned - base to a new folder.

    Args:
        tuned: The tuned donor's checkpoint (GRPO, say).
        base: The base donor's checkpoint (SFT, say): same names and shapes.
        output: The vector's folder, which must not exist.
        dtype: float32 (the exact difference of the donors, rounded once), bfloat16 or float16
            (half the size, rounded).
        encoding: auto (the smallest lossless one, tensor by tensor), dense, sparse, int8, lowrank.
        rank: Of lowrank.
        vocabulary: strict, or common for donors with different numbers of embedding rows.
        on_progress: Called after each tensor with the weights done and the weights in all.

    Returns:
        What was made, in numbers.

    Raises:
        CheckpointError: A donor can't be read, holds NaN, or the two don't match; all mismatches
            at once.
        ConfigError: The output exists or can't be written, or a choice has no such name.
    """
    choice = Choice(encoding, stored_dtype(dtype), rank)
    if vocabulary not in VOCABULARY_POLICIES:
        raise ConfigError(f"--vocab {vocabulary}: choose one of {', '.join(VOCABULARY_POLICIES)}")
    with (
        new_folder(output) as folder,
        DonorReader(Located.of(tuned)) as tuned_donor,
        DonorReader(Located.of(base)) as base_donor,
    ):
        pairs = match_donors(tuned_donor, base_donor, vocabulary)
        extractor = _Extractor(tuned_donor, base_donor, choice, on_progress)
        manifest = extractor.write(folder, pairs, vocabulary)
        write_manifest(folder, manifest)
    return extractor.summary(output, manifest)


def stored_dtype(name: str) -> torch.dtype:
    """Return the dtype that a user names.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in STORED_DTYPES:
        raise ConfigError(f"--dtype {name}: choose one of {', '.join(STORED_DTYPES)}")
    return STORED_DTYPES[name]


@dataclass(slots=True)
class _Difference:
    """One tensor of the vector: computed in blocks, and what the first pass over it told."""

    tuned: DonorReader
    base: DonorReader
    pair: Pair
    dtype: torch.dtype
    scratch: Scratch
    measures: Measures
    roundtrip: RoundtripCount
    squared_base_norm: float = 0.0

    def source(self) -> Source:
        """Give the difference, to be read in blocks any number of times."""
        return Source(self.pair.shape, lambda: (v for _, _, v in self._blocks()))

    def measured(self) -> _Difference:
        """Make the first pass, unless the tensor is of integers."""
        if self.is_float:
            for tuned, base, v in self._blocks():
                stored = self.measures.add(v, self.dtype)
                self.squared_base_norm += norm_of(base) ** 2
                self.roundtrip.add(tuned, base, stored)
        return self

    @property
    def is_float(self) -> bool:
        """Whether both sides are of a dtype that has a difference."""
        tables = self.tuned.reader.table, self.base.reader.table
        names = self.pair.tuned, self.pair.base
        return all(t[n].dtype in FLOAT_DTYPES for t, n in zip(tables, names, strict=True))

    def _blocks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Give blocks of tuned as it is stored, of base in float32, and of their difference."""
        rows = self.pair.shape[0] if self.pair.shape else None
        sides = self.tuned.blocks(self.pair.tuned, rows), self.base.blocks(self.pair.base, rows)
        for tuned, own_base in zip(*sides, strict=True):
            base = self.scratch.copy("base", own_base, torch.float32)
            wide = self.scratch.copy("v", tuned, torch.float32)
            yield tuned, base, difference(wide, base, out=wide)


@dataclass(slots=True)
class _Extractor:
    """The pass over all tensors, and what it has learned so far."""

    tuned: DonorReader
    base: DonorReader
    choice: Choice
    on_progress: Callable[[int, int], None] | None
    scratch: Scratch = field(default_factory=Scratch)
    roundtrip: RoundtripCount = field(default_factory=RoundtripCount)
    squared_norm: float = 0.0
    squared_base_norm: float = 0.0
    squared_error: float = 0.0
    done: int = 0

    def write(self, folder: Path, pairs: list[Pair], vocabulary: str) -> Manifest:
        """Write the shards, and describe them."""
        shapes = {pair.name: pair.shape for pair in pairs}
        total = sum(torch.Size(shape).numel() for shape in shapes.values())
        with (
            single_threaded_kernels(),
            VectorWriter(folder, shapes) as writer,
            _threads() as pool,
        ):
            for v in self._measured(pairs, pool):
                self._write_tensor(writer, v)
                self.done += writer.entries[v.pair.name].elements
                if self.on_progress is not None:
                    self.on_progress(self.done, total)
            files = writer.finish()
        return Manifest(
            formula="tuned - base",
            complete=True,
            donors=Donors(tuned=self.tuned.describe(), base=self.base.describe()),
            architecture=self.tuned.architecture,
            model_type=self.tuned.model_type,
            # Exports of the bare model have no head either, and say nothing of it.
            tie_word_embeddings=OUTPUT_HEAD not in writer.entries
            and not (self.tuned.is_untied or self.base.is_untied),
            vocabulary=vocabulary_of(self.tuned, self.base, vocabulary),
            tensors=dict(sorted(writer.entries.items())),
            files=files,
            roundtrip=self._roundtrip(writer.entries),
            tokenizer=fingerprint(self.tuned.folder),
            sketch=self._sketch(pairs),
            lineage=(),
            created=now(),
            tool=TOOL,
        )

    def summary(self, output: Path, manifest: Manifest) -> Extraction:
        """Sum up what was made."""
        entries = manifest.tensors.values()
        return Extraction(
            output=output,
            manifest=manifest,
            elements=self.done,
            changed_elements=sum(entry.changed or 0 for entry in entries),
            norm=self.squared_norm**0.5,
            relative_norm=(self.squared_norm / (self.squared_base_norm or 1.0)) ** 0.5,
            error=(self.squared_error / (self.squared_norm or 1.0)) ** 0.5,
            size_bytes=manifest.size_bytes,
        )

    def _measured(self, pairs: list[Pair], pool: Executor) -> Iterator[_Difference]:
        """Measure tensors on all cores, a little ahead of the one that is being written."""
        ahead: deque[Future[_Difference]] = deque()
        for pair in pairs:
            ahead.append(pool.submit(self._difference(pair).measured))
            if len(ahead) > WORKERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _difference(self, pair: Pair) -> _Difference:
        scratch = self.scratch
        return _Difference(
            self.tuned,
            self.base,
            pair,
            self.choice.dtype,
            scratch,
            Measures(scratch=scratch),
            RoundtripCount(scratch=scratch),
        )

    def _write_tensor(self, writer: VectorWriter, v: _Difference) -> None:
        pair, measures = v.pair, v.measures
        donors_dtype = self.tuned.reader.table[pair.tuned].dtype
        if not v.is_float:
            _check_equal(pair.name, self.tuned.tensor(pair.tuned), self.base.tensor(pair.base))
            writer.add(pair.name, pair.shape, Encoded("zero", donors_dtype), changed=0)
            return
        self._check_finite(pair.name, measures)
        encoded = encode(v.source(), self.choice, measures)
        if measures.changed == 0:
            encoded = Encoded("zero", donors_dtype)
        writer.add(
            pair.name,
            pair.shape,
            encoded,
            squared_norm=measures.squared_norm,
            base_norm=v.squared_base_norm**0.5,
            changed=measures.changed,
        )
        self.squared_norm += measures.squared_norm
        self.squared_base_norm += v.squared_base_norm
        self.squared_error += encoded.squared_error
        self.roundtrip.merge(v.roundtrip)

    def _check_finite(self, name: str, measures: Measures) -> None:
        if not measures.is_finite:
            raise CheckpointError(
                f"the difference of {name!r} is not finite",
                why="a donor holds NaN or infinity there, or the difference overflows "
                f"{self.choice.dtype}",
                fix="check the donors; a float32 vector can't overflow",
                tensor_name=name,
            )

    def _roundtrip(self, entries: dict[str, TensorEntry]) -> Roundtrip | None:
        # Counted before the encoding, and so not true of a lossy one.
        is_lossy = any(entry.encoding in LOSSY_ENCODINGS for entry in entries.values())
        return None if is_lossy else self.roundtrip.total()

    def _sketch(self, pairs: list[Pair]) -> Sketch:
        table = self.base.reader.table
        floats = [pair for pair in pairs if table[pair.base].dtype in FLOAT_DTYPES]
        own_names = {pair.name: pair.base for pair in floats}
        return make_sketch(
            {pair.name: pair.shape for pair in floats},
            lambda name, positions: self.base.sample(own_names[name], positions),
        )


@contextmanager
def _threads() -> Iterator[Executor]:
    """Give threads to measure in; what they have not begun is not done on an error."""
    with ThreadPoolExecutor(WORKERS, "rvec-extract") as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _check_equal(name: str, tuned: torch.Tensor, base: torch.Tensor) -> None:
    if tuned.dtype != base.dtype or not torch.equal(tuned, base):
        raise CheckpointError(
            f"tensor {name!r} is of {tuned.dtype} and differs between the donors",
            why="only floating-point weights (float32, bfloat16, float16) have a difference here",
            fix="use donors that are not quantized",
            tensor_name=name,
        )
