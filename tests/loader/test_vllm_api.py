"""The installed vLLM still offers what the loader takes from it."""

from __future__ import annotations

import inspect
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import get_args

import pytest

from vllm_rvec.loader.formats import BASE_FORMATS, REFUSED_FORMATS


@pytest.mark.parametrize("base_format", ["safetensors", "runai_streamer"])
def test_the_names_and_signatures_that_the_loader_relies_on(base_format: str) -> None:
    """A new vLLM release that moves one of them fails here, by name."""
    from vllm_rvec.loader.vllm_api import (
        BaseModelLoader,
        DefaultModelLoader,
        LoadConfig,
        get_model_loader,
        should_skip_weight,
    )

    base = get_model_loader(LoadConfig(load_format=base_format))
    assert isinstance(base, BaseModelLoader)
    assert list(inspect.signature(base.get_all_weights).parameters) == ["model_config", "model"]
    assert list(inspect.signature(base.load_weights).parameters) == ["model", "model_config"]
    assert list(inspect.signature(base.load_model).parameters) == [
        "vllm_config",
        "model_config",
        "prefix",
    ]
    assert list(inspect.signature(should_skip_weight).parameters) == [
        "weight_name",
        "local_expert_ids",
    ]
    config = LoadConfig()
    assert DefaultModelLoader(config).local_expert_ids is None
    assert config.load_format == "auto"
    assert config.model_loader_extra_config == {}


def test_every_format_of_vllm_is_either_used_or_refused() -> None:
    """A new one of vLLM's is looked at before it gets through."""
    from vllm.model_executor.model_loader import LoadFormats

    known = BASE_FORMATS.keys() | REFUSED_FORMATS.keys()
    assert set(get_args(LoadFormats)) <= known
    assert not BASE_FORMATS.keys() & REFUSED_FORMATS.keys()


def test_the_plugin_is_found_by_its_entry_point() -> None:
    """`vllm.general_plugins` leads every vLLM process to `register`."""
    (plugin,) = [p for p in entry_points(group="vllm.general_plugins") if p.name == "rvec"]
    register = plugin.load()
    register()
    register()  # vLLM may call it several times
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    loader = get_model_loader(
        LoadConfig(load_format="rvec", model_loader_extra_config={"vector": "x"})
    )
    assert type(loader).__name__ == "RvecModelLoader"


def test_what_a_live_change_takes_from_vllm() -> None:
    """Of its client, its workers and its reload; and where preloaded weights come from."""
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    from vllm_rvec.loader.vllm_api import WEIGHT_CACHE_DAEMON, EngineClient
    from vllm_rvec.loader.worker import RvecWorker

    calls: dict[str, set[str]] = {
        "collective_rpc": {"method", "args"},
        "pause_generation": {"mode", "clear_cache"},
        "resume_generation": set(),
        "reset_prefix_cache": {"reset_connector"},
        "is_paused": set(),
        "is_sleeping": set(),
    }
    for name, needed in calls.items():
        assert needed <= set(inspect.signature(getattr(EngineClient, name)).parameters), name
    assert "overrides" in inspect.signature(Worker.update_config).parameters
    assert "weights_iterator" in inspect.signature(GPUModelRunner.reload_weights).parameters
    # vLLM refuses a worker extension that has a name of its own worker's.
    ours = {name for name in vars(RvecWorker) if not name.startswith("__")}
    assert not {name for name in ours if hasattr(CPUWorker, name)}
    assert find_spec(WEIGHT_CACHE_DAEMON) is not None


def test_the_endpoint_plugin_has_a_name_of_its_own() -> None:
    """Nobody gets its path by allowing the load format."""
    (plugin,) = entry_points(group="vllm.endpoint_plugins", name="rvec_admin")
    assert plugin.load()().name == "rvec_admin"
    assert "rvec_admin" not in {p.name for p in entry_points(group="vllm.general_plugins")}
