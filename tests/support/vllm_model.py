"""A vLLM model in this process: created and filled by a loader, not yet post-processed.

vLLM's CPU build packs linear weights after loading and empties their parameters, so weights are
compared after `load_weights` and before that (shared facts, "vLLM's seams").
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm import ModelRegistry
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload.inplace import reload_weights
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.plugins import load_general_plugins
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.worker.gpu_worker import Worker

from vllm_rvec.loader.worker import RvecWorker

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "CreatedModel",
    "LiveWorker",
    "Loaded",
    "LoadedModel",
    "Place",
    "engine_config",
    "load_parameters",
    "register_class",
]


_REGISTERED: set[str] = set()


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model after `load_weights`."""

    parameters: dict[str, torch.Tensor]
    """Every parameter by vLLM's name, packed and sharded as vLLM holds it."""
    loader: Any
    """The model loader."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which rank of which layout this process is."""

    rank: int = 0
    ranks: int = 1
    store: Path | None = None
    """A file in which the ranks meet."""
    layout: dict[str, Any] = field(default_factory=dict)
    """vLLM's arguments for it: `tensor_parallel_size`, `enable_expert_parallel`, ..."""

    def enter(self) -> None:
        """Join the other ranks; the first call in a process counts."""
        if torch.distributed.is_initialized():
            return
        # In place of a port: nothing else on the machine can be in the way.
        store = (
            torch.distributed.HashStore()  # type: ignore[attr-defined]  # missing from torch's stubs
            if self.store is None
            else torch.distributed.FileStore(str(self.store), self.ranks)  # type: ignore[attr-defined]  # as above
        )
        torch.distributed.init_process_group(
            "gloo", store=store, rank=self.rank, world_size=self.ranks
        )
        # Without a model in it, this configuration has groups for models of every kind.
        with set_current_vllm_config(VllmConfig()):
            init_distributed_environment(self.ranks, self.rank, "env://", self.rank, "gloo")
            ensure_model_parallel_initialized(
                self.layout.get("tensor_parallel_size", 1),
                self.layout.get("pipeline_parallel_size", 1),
            )


ALONE = Place()


def engine_config(
    model: Path, load_format: str, extra: dict[str, object], dtype: str, **more: Any
) -> VllmConfig:
    """Make vLLM's configuration for one model, with this package's plugin registered."""
    load_general_plugins()
    register_class(model)
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
        place: Which rank this is.
    """

    def __init__(self, config: VllmConfig, model_config: Any = None, place: Place = ALONE) -> None:
        self._config = config
        self._model_config = model_config or config.model_config
        place.enter()
        dtype = config.model_config.dtype
        with set_current_vllm_config(config), set_default_torch_dtype(dtype):
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


class LoadedModel(CreatedModel):
    """A model of vLLM's, loaded and made into the kernels' layout, as a worker has it."""

    def __init__(self, config: VllmConfig) -> None:
        super().__init__(config)
        started = time.perf_counter()
        self.load(get_model_loader(config.load_config))
        with set_current_vllm_config(config):
            process_weights_after_loading(self.model, config.model_config, torch.device("cpu"))
        self.load_seconds = time.perf_counter() - started

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        dtype: torch.dtype = self._config.model_config.dtype
        return dtype

    @property
    def worker(self) -> LiveWorker:
        """A worker of vLLM's that holds this model and nothing else."""
        return LiveWorker(self._config, self.model)

    @torch.inference_mode()
    def discard(self) -> None:
        """Overwrite all weights, as level-2 sleep discards a GPU's memory."""
        for parameter in self.model.parameters():
            parameter.data.fill_(torch.nan)


class _Runner:
    """As much of a model runner as a reload needs."""

    def __init__(self, config: VllmConfig, model: torch.nn.Module) -> None:
        self.vllm_config = config
        self._model = model

    def get_model(self) -> torch.nn.Module:
        """Return the model."""
        return self._model

    def reload_weights(
        self, weights_iterator: Iterable[tuple[str, torch.Tensor]] | None = None
    ) -> None:
        """Do what vLLM's runners do, less their caches."""
        reload_weights(self.vllm_config, self._model, weights_iterator, None, True)


class LiveWorker(RvecWorker):
    """Our worker extension on vLLM's own `update_config` and `reload_weights`."""

    update_config = Worker.update_config
    reload_weights = Worker.reload_weights

    def __init__(self, config: VllmConfig, model: torch.nn.Module) -> None:
        self.vllm_config = config
        self.model_runner = _Runner(config, model)


def load_parameters(
    model: Path,
    load_format: str = "auto",
    *,
    dtype: str = "bfloat16",
    place: Place = ALONE,
    **extra: object,
) -> Loaded:
    """Load a checkpoint as `--load-format` and `--model-loader-extra-config` would."""
    config = engine_config(model, load_format, extra, dtype, **place.layout)
    config.parallel_config.rank = place.rank
    return CreatedModel(config, place=place).loaded_by(get_model_loader(config.load_config))


def register_class(model: Path | str) -> None:
    """Import a model's class here: vLLM would start a process of ten seconds to look at it."""
    (name,) = json.loads((Path(model) / "config.json").read_text())["architectures"]
    if name not in _REGISTERED:
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
        _REGISTERED.add(name)
