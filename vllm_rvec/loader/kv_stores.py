"""Keep apart what alphas compute: caches of keys and values, and of weights, that don't know alpha.

The keys that a layer computes depend on its weights. A store that several engines share, or that
outlives one, finds them by model name and tokens: it would hand the keys of one alpha to another,
and nobody would see it but in worse answers. vLLM's own prefix cache is each engine's own, and so
are connectors that offload to the engine's own memory.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from vllm_rvec.errors import ConfigError
from vllm_rvec.loader.vllm_api import WEIGHT_CACHE_DAEMON

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vllm_rvec.loader.vllm_api import KVTransferConfig

__all__ = ["foreign_connectors", "refuse_shared_stores", "refuse_weight_cache"]

MULTI = "MultiConnector"
OFFLOADING = "OffloadingConnector"
OWN_CONNECTORS = frozenset({OFFLOADING, "SimpleCPUOffloadConnector"})
"""They keep what they get in the engine's own memory, and forget it when vLLM tells them to."""

OWN_OFFLOADING = "CPUOffloadingSpec"
"""The one of `OffloadingConnector`'s places that no other engine reads; others are files, object
stores or peers."""


def refuse_shared_stores(transfer: KVTransferConfig | None, *, is_allowed: bool) -> None:
    """Refuse KV connectors whose keys don't know alpha.

    Args:
        transfer: vLLM's `kv_transfer_config`.
        is_allowed: Whether the user says that each vector and alpha has a store of its own.

    Raises:
        ConfigError: There is such a connector, and the user has not said so.
    """
    foreign = foreign_connectors(transfer)
    if not foreign or is_allowed:
        return
    raise ConfigError(
        f"the KV connector {' and '.join(foreign)} can't be used with a vector",
        why="it keeps keys and values under names that know the target and the tokens, but neither "
        "the vector nor alpha: engines of other alphas would be handed them, and answer worse "
        "without any error",
        fix="leave it out; or offload to the engine's own memory (--kv-offloading-size); or give "
        "each vector and alpha a store of its own and say so by the loader's key "
        '"kv_connector": "allow"',
    )


def foreign_connectors(transfer: KVTransferConfig | None) -> list[str]:
    """Name the KV connectors that may hand out what another engine, or another alpha, computed."""
    if transfer is None or transfer.kv_connector is None:
        return []
    given = {
        "kv_connector": transfer.kv_connector,
        "kv_connector_extra_config": transfer.kv_connector_extra_config,
        "kv_connector_module_path": transfer.kv_connector_module_path,
    }
    return sorted(set(_foreign(given)))


def refuse_weight_cache() -> None:
    """Refuse to fill the weights of `vllm preload`: engines find them by the target alone.

    Raises:
        ConfigError: This is one of its processes.
    """
    if WEIGHT_CACHE_DAEMON not in sys.modules:
        return
    raise ConfigError(
        "`vllm preload` can't hold fused weights",
        why="its key is made of the target's safetensors headers: engines that ask for the target, "
        "or for another vector or alpha, would be handed these weights",
        fix="start engines with --load-format rvec themselves; or merge to disk (vllm-rvec merge), "
        "and preload the merged checkpoint: one daemon for each, with a --socket-dir of its own",
    )


def _foreign(given: Mapping[str, object]) -> Iterator[str]:
    """Look at one connector, and at those inside it."""
    name, extra = given.get("kv_connector"), given.get("kv_connector_extra_config")
    extra = extra if isinstance(extra, dict) else {}
    if name == MULTI:
        for child in extra.get("connectors", []):
            yield from _foreign(child)
        return
    is_own = name in OWN_CONNECTORS and not given.get("kv_connector_module_path")
    if name == OFFLOADING:
        is_own = is_own and extra.get("spec_name", OWN_OFFLOADING) == OWN_OFFLOADING
    if not is_own:
        yield str(name)
