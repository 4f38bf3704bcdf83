"""A vLLM model in this process: created and filled by a loader, not yet post-processed.

vLLM's CPU build packs linear weights after loading and empties their parameters, so weights are
compared after `load_weights` and before that (shared facts, "vLLM's seams").
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.plugins import load_general_plugins
from vllm.utils.torch_utils import set_default_torch_dtype

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["CreatedModel", "Loaded", "engine_config", "load_parameters"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model after `load_weights`."""

    parameters: dict[str, torch.Tensor]
    """Every parameter by vLLM's name, packed and sharded as vLLM holds it."""
    loader: Any
    """The model loader."""


def engine_config(
    model: Path, load_format: str, extra: dict[str, object], dtype: str, **more: Any
) -> VllmConfig:
    """Make vLLM's configuration for one model, with this package's plugin registered."""
    load_general_plugins()
    arguments = EngineArgs(
        model=str(model),
        load_format=load_format,
        model_loader_extra_config=extra,
        dtype=dtype,
        max_model_len=128,
        enforce_eager=True,
        skip_tokenizer_init=True,
        use_tqdm_on_load=False,
        **more,
    )
    return arguments.create_engine_config()


class CreatedModel:
    """A model of vLLM's, created and empty; loaders may fill it any number of times.

    Args:
        config: The engine's.
        model_config: Of another model than the engine's own: its draft's.
    """

    def __init__(self, config: VllmConfig, model_config: Any = None) -> None:
        self._config = config
        self._model_config = model_config or config.model_config
        with set_current_vllm_config(config):
            _init_distributed()
            with set_default_torch_dtype(config.model_config.dtype):
                loader = get_model_loader(config.load_config)
                self.model = loader.create_model(config, self._model_config)

    def load(self, loader: Any) -> float:
        """Let a loader fill the model; return the seconds that `load_weights` took."""
        dtype = self._model_config.dtype
        with set_current_vllm_config(self._config), set_default_torch_dtype(dtype):
            started = time.perf_counter()
            loader.load_weights(self.model, self._model_config)
            return time.perf_counter() - started

    def loaded_by(self, loader: Any) -> Loaded:
        """Let a loader fill the model; return its parameters."""
        self.load(loader)
        named = self.model.named_parameters(remove_duplicate=False)
        return Loaded({name: parameter.data for name, parameter in named}, loader)


def load_parameters(
    model: Path, load_format: str = "auto", *, dtype: str = "bfloat16", **extra: object
) -> Loaded:
    """Load a checkpoint as `--load-format` and `--model-loader-extra-config` would."""
    config = engine_config(model, load_format, extra, dtype)
    return CreatedModel(config).loaded_by(get_model_loader(config.load_config))


def _init_distributed() -> None:
    if torch.distributed.is_initialized():
        return
    # A store in memory in place of a port: nothing else on the machine can be in the way.
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # missing from torch's stubs
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    init_distributed_environment(1, 0, "env://", 0, "gloo")
    ensure_model_parallel_initialized(1, 1)
