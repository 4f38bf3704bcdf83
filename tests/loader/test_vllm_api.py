"""The installed vLLM still offers what the loader takes from it."""

from __future__ import annotations

import inspect
from importlib.metadata import entry_points


def test_the_names_and_signatures_that_the_loader_overrides() -> None:
    """A new vLLM release that moves one of them fails here, by name."""
    from vllm_rvec.loader.vllm_api import DefaultModelLoader, LoadConfig

    assert list(inspect.signature(DefaultModelLoader.get_all_weights).parameters) == [
        "self",
        "model_config",
        "model",
    ]
    assert list(inspect.signature(DefaultModelLoader.load_weights).parameters) == [
        "self",
        "model",
        "model_config",
    ]
    config = LoadConfig()
    assert config.load_format == "auto"
    assert config.model_loader_extra_config == {}


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
