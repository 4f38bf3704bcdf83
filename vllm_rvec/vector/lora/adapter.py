"""The tensors of a PEFT adapter: pairs of factors, and whole tensors beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vllm_rvec.checkpoint.reader import CheckpointReader
from vllm_rvec.checkpoint.table import FLOAT_DTYPES, TensorInfo, read_header
from vllm_rvec.errors import CheckpointError
from vllm_rvec.vector.lora.config import config_problems, read_config
from vllm_rvec.vector.manifest import is_tensor_name

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from vllm_rvec.checkpoint.fetch import Located
    from vllm_rvec.vector.lora.config import AdapterConfig

__all__ = ["ADAPTER_NAME", "PREFIX", "Adapter", "Factors", "Whole"]

ADAPTER_NAME: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."
"""What PEFT puts before the names of the model's own modules."""

BASE_LAYER = ".base_layer."
"""What PEFT puts between a module that has factors and that module's own tensors."""

SIDES = {
    ".lora_A.weight": ("A", False),
    ".lora_B.weight": ("B", False),
    ".lora_embedding_A": ("A", True),
    ".lora_embedding_B": ("B", True),
}
"""How the names of factors end: the side, and whether they are an embedding's."""

MAX_NAME_CHARACTERS = 512


@dataclass(frozen=True, slots=True)
class Factors:
    """One module's B @ A: `[out, R] @ [R, in]`, of an embedding `[dim, R] @ [R, rows]`."""

    module: str
    """Its name without PEFT's prefix."""
    keys: tuple[str, str]
    """The names of A and B in the file."""
    lora_a: TensorInfo
    lora_b: TensorInfo
    scaling: float
    is_embedding: bool

    @property
    def name(self) -> str:
        """The tensor that the product is added to."""
        return f"{self.module}.weight"

    @property
    def rank(self) -> int:
        """The rank of the product."""
        return self.lora_a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of B @ A."""
        return self.lora_b.shape[0], self.lora_a.shape[1]


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor that the adapter holds as a whole, in place of the base's."""

    name: str
    """The base's tensor."""
    key: str
    """Its name in the file."""
    info: TensorInfo


class Adapter:
    """An adapter folder, opened: headers are read and checked, no data.

    Args:
        located: The folder and what it is called.

    Raises:
        CheckpointNotFoundError: There is no such folder.
        CheckpointError: It is no adapter in safetensors, or its file is damaged.
    """

    def __init__(self, located: Located) -> None:
        self.located = located
        self.config: AdapterConfig = read_config(located.folder)
        path = located.folder / ADAPTER_NAME
        if not path.is_file():
            raise _no_adapter(located.folder)
        self._reader = CheckpointReader(located.folder, read_header(path))
        self.problems: list[str] = list(config_problems(self.config))
        """What of it can't be taken, one line each."""
        self.factors: dict[str, Factors] = {}
        """By the name of the tensor that they change."""
        self.whole: dict[str, Whole] = {}
        """Likewise: `modules_to_save`, biases, and copies of the base's embedding."""
        self._read_names()

    def matrices(self, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B as they are stored: views of the mapped file."""
        a, b = (self._reader.tensor(key) for key in factors.keys)
        return a, b

    def tensor(self, whole: Whole) -> torch.Tensor:
        """Return a tensor that is held as a whole: a view of the mapped file."""
        return self._reader.tensor(whole.key)

    def _read_names(self) -> None:
        sides: dict[tuple[str, bool], dict[str, str]] = {}
        for key, info in self._reader.table.items():
            name = key.removeprefix(PREFIX)
            ending = next((ending for ending in SIDES if name.endswith(ending)), None)
            if problem := _key_problem(name, info, is_factor=ending is not None):
                self.problems.append(f"{key}: {problem}")
            elif ending is None:
                self._add_whole(name.replace(BASE_LAYER, "."), key, info)
            else:
                side, is_embedding = SIDES[ending]
                found = sides.setdefault((name.removesuffix(ending), is_embedding), {})
                if side in found:
                    self.problems.append(f"{key}: the file holds it twice, with and without prefix")
                found[side] = key
        for (module, is_embedding), found in sides.items():
            self._add_factors(module, found, is_embedding=is_embedding)
        if not self._reader.table:
            self.problems.append("the adapter holds no tensor")

    def _add_whole(self, name: str, key: str, info: TensorInfo) -> None:
        if name in self.whole:
            self.problems.append(f"{key}: the file holds {name} twice")
        self.whole[name] = Whole(name, key, info)

    def _add_factors(self, module: str, found: dict[str, str], *, is_embedding: bool) -> None:
        if len(found) < 2:
            self.problems.append(f"{module}: only one of its two factors is there")
            return
        keys = found["A"], found["B"]
        a, b = (self._reader.table[key] for key in keys)
        rank = self.config.rank(module)
        scaling = self.config.scaling(module)
        factors = Factors(module, keys, a, b, scaling, is_embedding)
        if (a.shape[0], b.shape[1]) != (rank, rank):
            self.problems.append(
                f"{module}: factors {list(a.shape)} and {list(b.shape)}, the rank is {rank}"
            )
        elif factors.name in self.factors:
            self.problems.append(f"{module}: two pairs of factors")
        else:
            self.factors[factors.name] = factors


def _key_problem(name: str, info: TensorInfo, *, is_factor: bool) -> str:
    if len(name) > MAX_NAME_CHARACTERS or not is_tensor_name(name):
        return "no name that a module can have"
    if f"{BASE_LAYER}lora_" in name:
        return "a second pair of factors of one module"
    if not is_factor and ("lora_" in name or "trainable_tokens" in name):
        return "not one of the tensors that a plain LoRA has"
    if info.dtype not in FLOAT_DTYPES:
        return f"dtype {info.dtype}, not one of {', '.join(FLOAT_DTYPES)}"
    if is_factor and (len(info.shape) != 2 or 0 in info.shape):
        return f"shape {list(info.shape)}: factors are matrices"
    return ""


def _no_adapter(folder: Path) -> CheckpointError:
    pickle = next(
        (n for n in ("adapter_model.bin", "adapter_model.pt") if (folder / n).exists()), ""
    )
    return CheckpointError(
        f"{folder} holds no {ADAPTER_NAME}",
        why=f"it holds {pickle}: pickle files can run code and are never read" if pickle else "",
        fix="save the adapter again by PEFT's save_pretrained, which writes safetensors",
        path=folder,
    )
