"""Make a stored vector from two donors: v = tuned - base, tensor by tensor.

Memory does not grow with the model: one tensor of each donor and their difference at a time. What
is unfinished is in a hidden folder beside the output and has no manifest, so nothing reads it as a
vector.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vllm_rvec import __version__
from vllm_rvec.arithmetic import FLOAT_DTYPES, difference, is_finite
from vllm_rvec.checkpoint.dtypes import DTYPE_NAMES
from vllm_rvec.checkpoint.reader import CheckpointReader
from vllm_rvec.checkpoint.table import read_config
from vllm_rvec.checkpoint.writer import ShardWriter
from vllm_rvec.errors import CheckpointError, ConfigError
from vllm_rvec.vector.compatibility import OUTPUT_HEAD
from vllm_rvec.vector.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Donor,
    Donors,
    Manifest,
    TensorEntry,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["STORED_DTYPES", "Extraction", "extract"]

STORED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What a vector can be stored as, by the name that a user writes."""


@dataclass(frozen=True, slots=True)
class Extraction:
    """What `extract` made."""

    output: Path
    """The vector's folder."""
    tensors: int
    """How many tensors the donors have."""
    zero_tensors: int
    """How many of them are the same in both."""
    elements: int
    """How many weights the donors have."""
    changed_elements: int
    """How many of them differ."""
    norm: float
    """The Frobenius norm of v."""
    relative_norm: float
    """That, over the norm of the base donor."""
    size_bytes: int
    """What the shards take on disk."""


@dataclass(slots=True)
class _Tally:
    elements: int = 0
    changed_elements: int = 0
    squared_norm: float = 0.0
    squared_base_norm: float = 0.0

    def add(self, base: torch.Tensor, v: torch.Tensor) -> None:
        self.elements += v.numel()
        self.changed_elements += int(torch.count_nonzero(v))
        self.squared_norm += float(torch.linalg.vector_norm(v)) ** 2
        self.squared_base_norm += float(torch.linalg.vector_norm(base, dtype=torch.float32)) ** 2


def extract(
    tuned: Path,
    base: Path,
    output: Path,
    *,
    dtype: str = "float32",
    on_progress: Callable[[int, int], None] | None = None,
) -> Extraction:
    """Write v = tuned - base to a new folder.

    Args:
        tuned: The tuned donor's checkpoint folder (GRPO, say).
        base: The base donor's checkpoint folder (SFT, say): same names and shapes.
        output: The vector's folder, which must not exist.
        dtype: float32 (the exact difference of the donors, rounded once), bfloat16 or float16
            (half the size, rounded).
        on_progress: Called after each tensor with the tensors done and the tensors in all.

    Returns:
        What was made, in numbers.

    Raises:
        CheckpointError: A donor can't be read, holds NaN, or the two don't match; all mismatches
            at once.
        ConfigError: The output exists, or the dtype has no such name.
    """
    if dtype not in STORED_DTYPES:
        raise ConfigError(f"--dtype {dtype}: choose one of {', '.join(STORED_DTYPES)}")
    if os.path.lexists(output):
        raise ConfigError(
            f"the output {output} exists already",
            why="a vector is never overwritten",
            fix="choose another folder, or remove it first",
        )
    tuned_reader, base_reader = CheckpointReader(tuned), CheckpointReader(base)
    _check_donors(tuned_reader, base_reader)
    with _unfinished(output) as folder:
        extractor = _Extractor(tuned_reader, base_reader, STORED_DTYPES[dtype], on_progress)
        extractor.write_shards(folder)
        manifest = _manifest(tuned, base, extractor.entries)
        _write_durably(folder / MANIFEST_NAME, manifest.model_dump_json(indent=1).encode())
    return _extraction(output, extractor)


def _extraction(output: Path, extractor: _Extractor) -> Extraction:
    tally, entries = extractor.tally, extractor.entries
    return Extraction(
        output=output,
        tensors=len(entries),
        zero_tensors=sum(entry.encoding == "zero" for entry in entries.values()),
        elements=tally.elements,
        changed_elements=tally.changed_elements,
        norm=tally.squared_norm**0.5,
        relative_norm=(tally.squared_norm / (tally.squared_base_norm or 1.0)) ** 0.5,
        size_bytes=sum(path.stat().st_size for path in output.glob("*.safetensors")),
    )


def _check_donors(tuned: CheckpointReader, base: CheckpointReader) -> None:
    ours, theirs = tuned.table, base.table
    problems = [f"{name}: only in {tuned.folder}" for name in sorted(ours.keys() - theirs.keys())]
    problems += [f"{name}: only in {base.folder}" for name in sorted(theirs.keys() - ours.keys())]
    problems += [
        f"{name}: shape {list(ours[name].shape)} tuned, {list(theirs[name].shape)} base"
        for name in sorted(ours.keys() & theirs.keys())
        if ours[name].shape != theirs[name].shape
    ]
    kinds = [read_config(reader.folder).get("model_type") for reader in (tuned, base)]
    if kinds[0] != kinds[1]:
        problems.append(f"model type: {kinds[0]} tuned, {kinds[1]} base")
    if problems:
        raise CheckpointError(
            "the donors don't match",
            problems=problems,
            why="a difference is only defined tensor by tensor, for one architecture",
            fix="use two checkpoints that were tuned from one pretrained initialisation",
        )


@contextmanager
def _unfinished(output: Path) -> Iterator[Path]:
    """Give a hidden folder that becomes `output` if the block succeeds, and is gone if not."""
    folder = _make_hidden(output)
    try:
        yield folder
        folder.chmod(0o755)
        _sync_folder(folder)
        folder.rename(output)
        _sync_folder(output.parent)
    except OSError as exc:
        shutil.rmtree(folder, ignore_errors=True)
        raise _cannot_write(output, exc) from exc
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _make_hidden(output: Path) -> Path:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{output.name}.unfinished-", dir=output.parent))
    except (OSError, ValueError) as exc:
        raise _cannot_write(output, exc) from exc


def _cannot_write(output: Path, exc: OSError | ValueError) -> ConfigError:
    why = getattr(exc, "strerror", None) or str(exc)
    return ConfigError(
        f"the output {output} can't be written",
        why=why,
        fix="choose a folder that can be made, on a disk with room for it",
        path=output,
    )


@dataclass(slots=True)
class _Extractor:
    """The pass over all tensors, and what it has learned so far."""

    tuned: CheckpointReader
    base: CheckpointReader
    dtype: torch.dtype
    on_progress: Callable[[int, int], None] | None
    tally: _Tally = field(default_factory=_Tally)
    entries: dict[str, TensorEntry] = field(default_factory=dict)

    def write_shards(self, folder: Path) -> None:
        """Write one shard for each shard of the tuned donor."""
        shards = sorted({info.shard for info in self.tuned.table.values()})
        for number, shard in enumerate(shards, start=1):
            shapes = {n: info.shape for n, info in self.tuned.table.items() if info.shard == shard}
            path = folder / _shard_name(number, len(shards))
            with ShardWriter(path, shapes, self.dtype, {"format": "pt"}) as writer:
                for name in shapes:
                    self.entries[name] = self._write_tensor(writer, name)
                    self._report()
                writer.finish()

    def _write_tensor(self, writer: ShardWriter, name: str) -> TensorEntry:
        tuned, base = self.tuned.tensor(name), self.base.tensor(name)
        info = self.tuned.table[name]
        if tuned.dtype not in FLOAT_DTYPES or base.dtype not in FLOAT_DTYPES:
            _check_equal(name, tuned, base)
            return TensorEntry(shape=info.shape, dtype=info.dtype, encoding="zero")
        v = difference(tuned, base)
        stored = v.to(self.dtype)
        _check_finite(name, stored)
        self.tally.add(base, v)
        if not torch.count_nonzero(v):
            return TensorEntry(shape=info.shape, dtype=info.dtype, encoding="zero")
        writer.write(name, stored)
        return TensorEntry(shape=info.shape, dtype=DTYPE_NAMES[self.dtype], encoding="dense")

    def _report(self) -> None:
        if self.on_progress is not None:
            self.on_progress(len(self.entries), len(self.tuned.table))


def _check_finite(name: str, stored: torch.Tensor) -> None:
    if not is_finite(stored):
        raise CheckpointError(
            f"the difference of {name!r} is not finite",
            why=f"a donor holds NaN or infinity there, or the difference overflows {stored.dtype}",
            fix="check the donors; a float32 vector can't overflow",
            tensor_name=name,
        )


def _check_equal(name: str, tuned: torch.Tensor, base: torch.Tensor) -> None:
    if tuned.dtype != base.dtype or not torch.equal(tuned, base):
        raise CheckpointError(
            f"tensor {name!r} is of {tuned.dtype} and differs between the donors",
            why="only floating-point weights (float32, bfloat16, float16) have a difference here",
            fix="use donors that are not quantized",
            tensor_name=name,
        )


def _manifest(tuned: Path, base: Path, entries: dict[str, TensorEntry]) -> Manifest:
    config = read_config(tuned)
    architectures = config.get("architectures") or [""]
    return Manifest(
        format="rvec",
        format_version=FORMAT_VERSION,
        formula="tuned - base",
        donors=Donors(tuned=_donor(tuned), base=_donor(base)),
        architecture=str(architectures[0])
        if isinstance(architectures, list) and architectures
        else "",
        model_type=str(config.get("model_type", "")),
        # Configurations often leave the key out; a donor without a head of its own is tied.
        tie_word_embeddings=config.get("tie_word_embeddings") is True or OUTPUT_HEAD not in entries,
        tensors=dict(sorted(entries.items())),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        tool=f"vllm_rvec {__version__}",
    )


def _donor(folder: Path) -> Donor:
    config_sha256 = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    return Donor(name=folder.resolve().name, config_sha256=config_sha256)


def _shard_name(number: int, count: int) -> str:
    return "vector.safetensors" if count == 1 else f"vector-{number:05d}-of-{count:05d}.safetensors"


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
