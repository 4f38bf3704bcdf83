"""Make a PEFT adapter of a stored vector: of each linear weight the best product of two factors.

What vLLM's LoRA does not serve (embedding, output head, norms, biases) is left out, and counted:
an adapter is an approximation, and the energy that it keeps says how good a one.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import torch

from vllm_rvec.arithmetic import is_finite
from vllm_rvec.checkpoint.digest import file_digest
from vllm_rvec.checkpoint.fetch import Located
from vllm_rvec.checkpoint.output import new_folder, write_durably
from vllm_rvec.checkpoint.writer import ShardWriter
from vllm_rvec.errors import ConfigError, VectorCorruptError, VectorFormatError
from vllm_rvec.vector.encodings.lowrank import product, top_singular
from vllm_rvec.vector.layout import LORA_A, LORA_B
from vllm_rvec.vector.lora.adapter import ADAPTER_NAME, PREFIX
from vllm_rvec.vector.lora.card import make_adapter_card
from vllm_rvec.vector.lora.config import CONFIG_NAME
from vllm_rvec.vector.lora.matching import is_conv1d
from vllm_rvec.vector.manifest import MANIFEST_NAME
from vllm_rvec.vector.names import is_vocabulary
from vllm_rvec.vector.reader import VectorReader
from vllm_rvec.vector.verification import verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from vllm_rvec.vector.manifest import Manifest

__all__ = ["ADAPTER_DTYPES", "Exported", "LoraExport", "export_lora"]

ADAPTER_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What factors can be stored as, by the name that a user writes."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""

WEIGHT = ".weight"
CAUSAL_PREFIXES = (
    "model.",
    "transformer.",
    "gpt_neox.",
    "language_model.",
    "backbone.",
    "lm_head.",
)
"""What the names of a causal language model's modules begin with; a bare model's have none."""


@dataclass(frozen=True, slots=True)
class Exported:
    """One tensor of the vector, and what the adapter has of it."""

    name: str
    """The tensor."""
    how: str
    """svd, factors (those of the vector, as they are), or why it is left out."""
    rank: int
    """How many columns of the factors are used; 0 where it is left out."""
    squared_norm: float
    """||v||^2."""
    squared_error: float
    """||v - scaling * B A||^2; all of ||v||^2 where it is left out."""

    @property
    def kept(self) -> float:
        """The share of the energy that is kept.

        For a truncated SVD that is ||approx||^2 / ||v||^2; rounded factors keep a little less.
        """
        return 1 - self.squared_error / self.squared_norm if self.squared_norm else 1.0


@dataclass(frozen=True, slots=True)
class LoraExport:
    """What `export_lora` made."""

    output: Path
    """The adapter's folder."""
    rank: int
    """Its rank."""
    scaling: float
    """lora_alpha over the rank."""
    base: str
    """What the adapter names as its base."""
    tensors: tuple[Exported, ...]
    """Every tensor of the vector that is not zero."""
    size_bytes: int
    """What the adapter takes on disk."""

    @property
    def max_lora_rank(self) -> int | None:
        """What vLLM's --max-lora-rank has to be; None if the rank is too high for it."""
        return next((rank for rank in VLLM_RANKS if rank >= self.rank), None)

    @property
    def kept(self) -> float:
        """The share of the whole vector's energy that is kept."""
        return _kept(self.tensors)

    @property
    def kept_of_linear(self) -> float:
        """The share of the energy of the exported weights that is kept."""
        return _kept(t for t in self.tensors if t.rank)

    @property
    def left_out(self) -> dict[str, float]:
        """By reason, the share of the whole energy that is left out."""
        total = sum(t.squared_norm for t in self.tensors) or 1.0
        shares: dict[str, float] = defaultdict(float)
        for tensor in self.tensors:
            if not tensor.rank:
                shares[tensor.how] += tensor.squared_norm / total
        return dict(shares)


def export_lora(
    vector: Path | Located,
    output: Path,
    *,
    rank: int,
    base: str | None = None,
    dtype: str = "float32",
    on_progress: Callable[[int, int], None] | None = None,
) -> LoraExport:
    """Write a vector's linear weights as a PEFT adapter to a new folder.

    Args:
        vector: The stored vector.
        output: The adapter's folder, which must not exist.
        rank: The largest rank of a module's factors. A lowrank tensor of no higher rank is passed
            on as it is.
        base: What the adapter names as the model it belongs to; the base donor, if not given.
        dtype: Of the factors: float32 or bfloat16.
        on_progress: Called after each tensor with the weights done and the weights in all.

    Returns:
        What was made, and how much of the vector it holds.

    Raises:
        ConfigError: The output exists or can't be written, or a choice can't be had.
        VectorFormatError: It is no vector, or none with a linear weight that is not zero.
        VectorCorruptError: The vector is damaged, or holds NaN or infinity.
    """
    if rank < 1:
        raise ConfigError(f"--rank {rank}: a rank is 1 or more")
    if dtype not in ADAPTER_DTYPES:
        raise ConfigError(f"--dtype {dtype}: choose one of {', '.join(ADAPTER_DTYPES)}")
    located = Located.of(vector)
    with new_folder(output) as folder:
        reader = VectorReader(located.folder)
        verify(reader)  # an adapter has no digest by which damage would be found later
        exporter = _Exporter(reader, rank, ADAPTER_DTYPES[dtype], on_progress)
        exporter.write_factors(folder / ADAPTER_NAME)
        made = exporter.summary(output, folder, base)
        config = json.dumps(exporter.config(made.base), indent=2)
        write_durably(folder / CONFIG_NAME, config.encode())
        write_durably(folder / "README.md", exporter.card(made, located).encode())
    return made


@dataclass(slots=True)
class _Exporter:
    """The pass over all tensors."""

    vector: VectorReader
    max_rank: int
    dtype: torch.dtype
    on_progress: Callable[[int, int], None] | None
    found: list[Exported] = field(default_factory=list)

    @property
    def manifest(self) -> Manifest:
        """What the vector says of itself."""
        return self.vector.manifest

    @property
    def rank(self) -> int:
        """The adapter's one rank: no larger than any module needs. Smaller factors get zeros.

        Not PEFT's rank_pattern: engines that don't know it would scale those modules wrongly.
        """
        return max(self._rank_of(name) for name in self._linear())

    @property
    def scaling(self) -> float:
        """lora_alpha over the rank: the vector's own, where all passed factors share one.

        Then they are passed on bit for bit; else their scaling goes into B, by one rounding.
        """
        tensors = self.manifest.tensors
        own = {tensors[name].scaling for name in self._linear() if self._is_passed(name)}
        only = own.pop() if len(own) == 1 else None
        return only if only is not None and only > 0 else 1.0

    def write_factors(self, path: Path) -> None:
        """Write the adapter's tensors, and note what becomes of every tensor of the vector."""
        linear = self._linear()
        if not linear:
            raise VectorFormatError(
                f"the vector {self.vector.folder} has nothing that an adapter could hold",
                why="all its linear weights are zero",
                fix="check the vector with `vllm-rvec inspect`",
                path=self.vector.folder,
            )
        total = sum(entry.elements for entry in self.manifest.tensors.values())
        done, rank, scaling = 0, self.rank, self.scaling
        with ShardWriter(path, self._shapes(linear, rank), {"format": "pt"}) as shard:
            for name, entry in self.manifest.tensors.items():
                if entry.encoding != "zero":
                    self._export(shard, name, rank, scaling)
                    self.vector.release(name)
                done += entry.elements
                if self.on_progress is not None:
                    self.on_progress(done, total)
            shard.finish()

    def summary(self, output: Path, folder: Path, base: str | None) -> LoraExport:
        """Sum up what was made."""
        return LoraExport(
            output=output,
            rank=self.rank,
            scaling=self.scaling,
            base=base or self.manifest.donors.base.id,
            tensors=tuple(self.found),
            size_bytes=(folder / ADAPTER_NAME).stat().st_size,
        )

    def config(self, base: str) -> dict[str, object]:
        """Make what adapter_config.json holds."""
        alpha = self.scaling * self.rank
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
            "lora_dropout": 0.0,
            "target_modules": self._target_modules(),
            "fan_in_fan_out": any(self._is_transposed(name) for name in self._linear()),
            "bias": "none",
            "modules_to_save": None,
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": False,
            "inference_mode": True,
        }

    def card(self, made: LoraExport, vector: Located) -> str:
        """Make the adapter's README.md."""
        return make_adapter_card(
            made, self.manifest, vector, file_digest(vector.folder / MANIFEST_NAME)
        )

    def _linear(self) -> list[str]:
        tensors = self.manifest.tensors.items()
        return [n for n, e in tensors if e.encoding != "zero" and not _why_left_out(n, e.shape)]

    def _is_passed(self, name: str) -> bool:
        is_lowrank = self.manifest.tensors[name].encoding == "lowrank"
        return is_lowrank and self.vector.table[name + LORA_A].shape[0] <= self.max_rank

    def _rank_of(self, name: str) -> int:
        if self._is_passed(name):
            return self.vector.table[name + LORA_A].shape[0]
        return min(self.max_rank, *self.manifest.tensors[name].shape)

    def _is_transposed(self, name: str) -> bool:
        return is_conv1d(self.manifest.model_type, name)

    def _shapes(self, linear: list[str], rank: int) -> list[tuple[str, tuple[int, ...]]]:
        sides = ("lora_A", "lora_B")
        return [
            (self._key(name, side), (rank, sum(self.manifest.tensors[name].shape)))
            for name in linear
            for side in sides
        ]

    def _key(self, name: str, side: str) -> str:
        return f"{PREFIX}{self._module(name)}.{side}.weight"

    def _module(self, name: str) -> str:
        """Name a tensor's module in the model that PEFT and vLLM build."""
        if not any(known.startswith(CAUSAL_PREFIXES) for known in self.manifest.tensors):
            name = f"{'transformer' if self._is_transposed(name) else 'model'}.{name}"
        return name.removesuffix(WEIGHT)

    def _target_modules(self) -> list[str]:
        """Name modules by their last part, where the adapter has all of that name; else in full.

        A module that is named but not in the file would be trained from scratch, or warned about.
        """
        linear = set(self._linear())
        by_last: dict[str, list[str]] = defaultdict(list)
        for name in self.manifest.tensors:
            if name.endswith(WEIGHT):
                by_last[self._module(name).rpartition(".")[2]].append(name)
        found: list[str] = []
        for last, names in by_last.items():
            is_whole = self.manifest.complete and linear.issuperset(names)
            found += [last] if is_whole else [self._module(n) for n in names if n in linear]
        return sorted(found)

    def _export(self, shard: ShardWriter, name: str, rank: int, scaling: float) -> None:
        v = self.vector.tensor(name)
        if v is None or not is_finite(v):
            raise VectorCorruptError(
                f"tensor {name!r} of {self.vector.folder} holds NaN or infinity",
                fix="extract the vector again from donors that are sound, or copy it again",
                path=self.vector.folder,
                tensor_name=name,
            )
        v = v.float()
        squared_norm = _squared_norm(v)
        if why := _why_left_out(name, tuple(v.shape)):
            self.found.append(Exported(name, why, 0, squared_norm, squared_norm))
            return
        a, b = self._factors(name, v, scaling)
        how = "factors" if self._is_passed(name) else "svd"
        error = _squared_norm(product(a, b, scaling).sub_(v))
        self.found.append(Exported(name, how, a.shape[0], squared_norm, error))
        if self._is_transposed(name):
            a, b = b.T, a.T  # the module's weight is the tensor's transpose
        missing = rank - a.shape[0]
        shard.write(self._key(name, "lora_A"), torch.nn.functional.pad(a, (0, 0, 0, missing)))
        shard.write(self._key(name, "lora_B"), torch.nn.functional.pad(b, (0, missing)))

    def _factors(
        self, name: str, v: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A `[R, columns]` and B `[rows, R]` with v ~ scaling * B A."""
        if self._is_passed(name):
            a, b = self.vector.part(name + LORA_A), self.vector.part(name + LORA_B)
            own = self.manifest.tensors[name].scaling
            if own is not None and own != scaling:
                b = b.double().mul_(own / scaling)
            return a.to(self.dtype), b.to(self.dtype)
        left, values, right = top_singular(v, self._rank_of(name))
        root = (values / scaling).sqrt()
        return (root.unsqueeze(1) * right).to(self.dtype), (left * root).to(self.dtype)


def _why_left_out(name: str, shape: tuple[int, ...]) -> str:
    """Say why vLLM's LoRA does not serve a tensor; empty for a linear weight."""
    module = name.removesuffix(WEIGHT).rpartition(".")[2]
    if is_vocabulary(name) or "embed" in module or module in {"wte", "wpe", "lm_head"}:
        return "embedding or output head"
    if len(shape) < 2:
        return "norm or bias"
    if len(shape) > 2 or not name.endswith(WEIGHT):
        return "no linear weight"
    return ""


def _squared_norm(tensor: torch.Tensor) -> float:
    # In float64: shares of many tensors are summed up.
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _kept(tensors: Iterable[Exported]) -> float:
    squares = [(t.squared_norm, t.squared_error) for t in tensors]
    total = math.fsum(norm for norm, _ in squares)
    return 1 - math.fsum(error for _, error in squares) / total if total else 1.0
