"""Stores whose keys don't know alpha are refused, with the ways out."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from vllm_rvec.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family

LMCACHE: dict[str, Any] = {"kv_connector": "LMCacheConnectorV1"}
OFFLOADING: dict[str, Any] = {"kv_connector": "OffloadingConnector"}


def transfer(connector: str, **given: Any) -> Any:
    from vllm.config import KVTransferConfig

    return KVTransferConfig(kv_connector=connector, kv_role="kv_both", **given)


def foreign(connector: str, **given: Any) -> list[str]:
    from vllm_rvec.loader.kv_stores import foreign_connectors

    return foreign_connectors(transfer(connector, **given))


def test_the_engines_own_memory_is_no_store() -> None:
    """Nothing there outlives it, or is seen by another engine."""
    from vllm_rvec.loader.kv_stores import foreign_connectors

    assert foreign_connectors(None) == []
    assert foreign("OffloadingConnector", kv_connector_extra_config={"cpu_bytes_to_use": 1}) == []
    assert foreign("SimpleCPUOffloadConnector") == []
    children = {"connectors": [OFFLOADING, {"kv_connector": "SimpleCPUOffloadConnector"}]}
    assert foreign("MultiConnector", kv_connector_extra_config=children) == []


@pytest.mark.parametrize(
    ("connector", "given"),
    [
        ("LMCacheConnectorV1", {}),
        ("LMCacheMPConnector", {}),
        ("MooncakeStoreConnector", {}),
        ("NixlConnector", {}),
        ("HF3FSKVConnector", {}),
        (
            "OffloadingConnector",
            {"kv_connector_extra_config": {"spec_name": "TieringOffloadingSpec"}},
        ),
        ("OffloadingConnector", {"kv_connector_module_path": "somebody.elses"}),
        ("MultiConnector", {"kv_connector_extra_config": {"connectors": [OFFLOADING, LMCACHE]}}),
    ],
)
def test_what_others_may_read_is(connector: str, given: dict[str, Any]) -> None:
    """By name; of several inside one, only those."""
    expected = "LMCacheConnectorV1" if connector == "MultiConnector" else connector
    assert foreign(connector, **given) == [expected]


def test_the_names_are_those_that_vllm_knows() -> None:
    """An own connector that vLLM renames would be refused from then on."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

    from vllm_rvec.loader.kv_stores import MULTI, OWN_CONNECTORS, OWN_OFFLOADING

    for name in (*OWN_CONNECTORS, MULTI):
        assert KVConnectorFactory.get_connector_class_by_name(name).__name__ == name
    assert CPUOffloadingSpec.__name__ == OWN_OFFLOADING


def test_own_connectors_forget_when_vllm_tells_them_to() -> None:
    """What a change of alpha relies on: they have a `reset_cache` of their own."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    from vllm_rvec.loader.kv_stores import OWN_CONNECTORS

    for name in OWN_CONNECTORS:
        connector = KVConnectorFactory.get_connector_class_by_name(name)
        assert connector.reset_cache is not KVConnectorBase_V1.reset_cache


def test_a_load_with_such_a_store_is_refused(family: Family, vector: Path) -> None:
    """Before any weight is read, with the reason and the ways out; unless the user allows it."""
    from tests.support.vllm_model import CreatedModel, engine_config

    extra: dict[str, object] = {"vector": str(vector)}
    config = engine_config(family.target, "rvec", extra, "bfloat16")
    config.kv_transfer_config = transfer("LMCacheConnectorV1")
    with pytest.raises(ConfigError, match="LMCacheConnectorV1") as caught:
        CreatedModel(config)
    assert "neither the vector nor alpha" in caught.value.why
    assert '"kv_connector": "allow"' in caught.value.fix
    config.load_config.model_loader_extra_config = extra | {"kv_connector": "allow"}
    CreatedModel(config)


def test_the_key_of_preloaded_weights_does_not_know_alpha(family: Family, vector: Path) -> None:
    """The reason for the refusal: two alphas, one key."""
    from vllm.model_executor.model_loader.weight_cache.protocol import WeightCacheKey

    from tests.support.vllm_model import engine_config

    configs = [
        engine_config(family.target, "rvec", {"vector": str(vector), "alpha": alpha}, "bfloat16")
        for alpha in (0.3, 1.0)
    ]
    first, second = (WeightCacheKey.from_model_config(c.model_config, 1, 0) for c in configs)
    assert first == second


def test_preloading_fused_weights_is_refused(family: Family, vector: Path) -> None:
    """In a process of `vllm preload`: its own class, as it loads its model."""
    done = subprocess.run(
        [sys.executable, "-c", PRELOAD, str(family.target), str(vector)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "can't hold fused weights" in done.stdout


PRELOAD = """
import sys
from pathlib import Path
from unittest import mock

from tests.support.vllm_model import CreatedModel, engine_config
from vllm.model_executor.model_loader.weight_cache import daemon
from vllm_rvec.errors import ConfigError

config = engine_config(Path(sys.argv[1]), "rvec", {"vector": sys.argv[2]}, "bfloat16")
preload = object.__new__(daemon.WeightCacheDaemon)
preload.vllm_config, preload.model_config = config, config.model_config
try:
    preload.get_model()
except ConfigError as exc:
    print(exc)
"""
