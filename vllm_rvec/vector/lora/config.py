"""`adapter_config.json`: what of PEFT's many kinds of adapters is a plain sum of matrices.

An adapter is taken only if merging it means adding `scaling * B @ A`, and nothing else, to weights
that the base has. Everything else is refused by name. Imports no torch.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_rvec.checkpoint.table import is_folder, what_it_is, why_no_folder, without_duplicates
from vllm_rvec.errors import CheckpointError, CheckpointNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from typing import Any

__all__ = ["CONFIG_NAME", "CONV1D_MODEL_TYPES", "AdapterConfig", "config_problems", "read_config"]

CONFIG_NAME: Final = "adapter_config.json"
MAX_CONFIG_BYTES = 16 << 20

CONV1D_MODEL_TYPES: Final = frozenset({"decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
"""Models that transformers builds of `Conv1D`, whose weights are stored as `[in, out]`."""

PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights, beside true and false, that leave the base as it is."""

REFUSED: Final = {
    "use_dora": "DoRA scales every row of the sum: no fixed difference can say that",
    "lora_bias": "a bias beside the factors",
    "use_qalora": "factors over groups of inputs",
    "alora_invocation_tokens": "Activated LoRA changes some tokens' weights only",
    "layer_replication": "the adapter makes another model, with layers used twice",
    "target_parameters": "adapters of parameters (fused experts, say), not of modules",
    "trainable_token_indices": "trained rows of the embedding, outside the factors",
    "use_bdlora": "block-diagonal factors",
    "arrow_config": "a router between adapters, not one adapter",
    "monteclora_config": "random samples beside the factors",
    "kasa_config": "the base is truncated before the factors are added",
    "megatron_config": "factors of Megatron's layers",
}
"""Fields that change what the adapter means."""

HARMLESS = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "runtime_config",
        "target_modules",
        "task_type",
        "velora_config",
    }
)
"""Fields that say how it was trained, or what the tensors' names say too."""

MAX_PATTERN_CHARACTERS = 1024
MAX_REPEATS, MAX_GROUPS = 2, 3
REPEAT = re.compile(r"[*+{]|(?<!\()\?")
REPEATED_GROUP = re.compile(r"\)[*+{?]")
"""Patterns come from strangers, and with many of these, matching takes exponential time."""


def _check_pattern(pattern: str) -> str:
    is_short = len(pattern) <= MAX_PATTERN_CHARACTERS and pattern.count("(") <= MAX_GROUPS
    if not is_short or len(REPEAT.findall(pattern)) > MAX_REPEATS or REPEATED_GROUP.search(pattern):
        raise ValueError(f"a pattern that could take for ever to match: {pattern[:80]!r}")
    try:
        re.compile(pattern)
    except re.error as exc:
        raise ValueError(f"no regular expression: {pattern[:80]!r} ({exc})") from exc
    return pattern


Rank = Annotated[int, Field(ge=1, le=1 << 20)]
Alpha = Annotated[float, Field(allow_inf_nan=False)]


class AdapterConfig(BaseModel):
    """The fields of `adapter_config.json` that decide what is added."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    peft_type: str
    """Only LORA is taken."""
    r: Rank
    """Rank of every pair of factors that no pattern names."""
    lora_alpha: Alpha
    """Times B @ A, over the rank or its root."""
    use_rslora: bool = False
    """Divide by the root of the rank, not by the rank."""
    rank_pattern: dict[str, Rank] | None = None
    """Other ranks, by regular expressions for the end of a module's name; the first counts."""
    alpha_pattern: dict[str, Alpha] | None = None
    """Likewise other alphas."""
    fan_in_fan_out: bool = False
    """The base's weights are stored as `[in, out]`."""
    bias: str = "none"
    """Which biases were trained: none, all, lora_only. The tensors say it too."""
    modules_to_save: list[str] | None = None
    """Modules that were trained as a whole. The tensors say it too."""
    ensure_weight_tying: bool = False
    """A tied output head was trained as the embedding's."""
    init_lora_weights: bool | str | None = True
    """How training began."""
    base_model_name_or_path: str | None = None
    """What the adapter was trained on: a Hub id or a folder of its maker's."""
    revision: str | None = None
    """The base's revision on the Hub."""

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _check_patterns(cls, patterns: dict[str, Any] | None) -> dict[str, Any] | None:
        for pattern in patterns or ():
            _check_pattern(pattern)
        return patterns

    def rank(self, module: str) -> int:
        """Return the rank of a module's factors.

        Args:
            module: Its name without `base_model.model.`, as PEFT matches it.
        """
        return int(_matched(self.rank_pattern or {}, module, self.r))

    def scaling(self, module: str) -> float:
        """Return what a module's product B @ A is multiplied with, as PEFT computes it."""
        alpha = _matched(self.alpha_pattern or {}, module, self.lora_alpha)
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _matched(patterns: Mapping[str, float], module: str, default: float) -> float:
    """Find a module's own value by PEFT's rule (`get_pattern_key`): a suffix after a dot."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def read_config(folder: Path) -> AdapterConfig:
    """Read an adapter folder's configuration; what it asks for is `config_problems`' business.

    Raises:
        CheckpointNotFoundError: There is no such folder.
        CheckpointError: It has no adapter_config.json, or not one that PEFT writes.
    """
    path = folder / CONFIG_NAME
    if not is_folder(folder):
        raise CheckpointNotFoundError(
            f"there is no adapter folder {folder}",
            why=why_no_folder(folder),
            fix=f"give the folder that holds {CONFIG_NAME} and adapter_model.safetensors",
            path=folder,
        )
    try:
        found = json.loads(_read(path), object_pairs_hook=without_duplicates)
        return AdapterConfig.model_validate(found)
    except ValidationError as exc:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors()]
        raise _no_config(path, problems) from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise _no_config(path, [str(exc)]) from exc


def _read(path: Path) -> bytes:
    if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(_why_no_config(path))
    return path.read_bytes()


def _why_no_config(path: Path) -> str:
    if path.is_file():
        return f"it is larger than {MAX_CONFIG_BYTES} bytes"
    return ", ".join(filter(None, ("there is no such file", what_it_is(path.parent))))


def config_problems(config: AdapterConfig) -> Iterator[str]:
    """Say what an adapter is beyond a plain LoRA, one line for each field."""
    if config.peft_type != "LORA":
        yield f"peft_type {config.peft_type}: only LORA is a sum with B @ A"
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        yield (
            f"init_lora_weights {init}: it changed the base's weights; convert the adapter by "
            "PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    for field, value in sorted((config.model_extra or {}).items()):
        if value and field in REFUSED:
            yield f"{field}: {REFUSED[field]}"
        elif value and field not in HARMLESS:
            yield f"{field}: this version does not know what it changes"


def _no_config(path: Path, problems: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} is no configuration of a LoRA adapter",
        problems=problems,
        fix=f"give a folder that PEFT's save_pretrained wrote: {CONFIG_NAME} and "
        "adapter_model.safetensors",
        path=path,
    )
