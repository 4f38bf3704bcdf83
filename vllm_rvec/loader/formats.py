"""Under which of vLLM's load formats the target itself can be read, and under which not.

A format can be used where it streams a safetensors checkpoint in the checkpoint's own names: the
vector is added to what streams by. Imports no vllm.
"""

from __future__ import annotations

from typing import Final

__all__ = ["BASE_FORMATS", "LOADER_PACKAGES", "REFUSED_FORMATS", "VLLM_KEYS", "format_problem"]

BASE_FORMATS: Final = {
    "safetensors": ("enable_multithread_load", "num_threads", "enable_weights_track"),
    "runai_streamer": ("concurrency", "memory_limit", "distributed"),
    "fastsafetensors": ("enable_weights_track",),
    "instanttensor": ("enable_weights_track",),
}
"""vLLM's loaders that can read the target, each with its own keys, handed on unchanged."""

LOADER_PACKAGES: Final = {
    "runai_streamer": "runai-model-streamer",
    "fastsafetensors": "fastsafetensors",
    "instanttensor": "instanttensor",
}
"""What has to be installed for them."""

VLLM_KEYS: Final = tuple(dict.fromkeys(key for keys in BASE_FORMATS.values() for key in keys))
"""All keys that are not ours."""

_NAMES_OF_VLLM = "it holds vLLM's own packed and sharded tensors, and a vector has a checkpoint's"
_PICKLE = "it unpickles, which can run code, and a vector belongs to safetensors"
_NO_CHECKPOINT = "it fills the model by itself; there is no stream of tensors to add to"
_MAY_UNPICKLE = "it falls back to pickle files; safetensors is what it finds otherwise"

REFUSED_FORMATS: Final = {
    "dummy": "its weights are random: there is no target to add a vector to",
    "auto": _MAY_UNPICKLE,
    "hf": _MAY_UNPICKLE,
    "pt": _PICKLE,
    "npcache": _PICKLE,
    "mistral": "consolidated files have names of their own, a vector has those of Hugging Face",
    "sharded_state": _NAMES_OF_VLLM,
    "runai_streamer_sharded": _NAMES_OF_VLLM,
    "tensorizer": _NO_CHECKPOINT,
    "modelexpress": _NO_CHECKPOINT,
    "ipc_cache": "its daemon keeps loaded weights by the target alone, whatever vector and alpha",
    "gguf": "it is quantized; use the model's own safetensors checkpoint",
    "bitsandbytes": "it is quantized; use the model's own safetensors checkpoint",
    "rvec": "that is this loader itself",
}
"""Formats under which the target can't be read, and why."""


def format_problem(name: str) -> str:
    """Say why a format can't be used under ours; empty where it can.

    >>> format_problem("safetensors")
    ''
    """
    if name in BASE_FORMATS:
        return ""
    why = REFUSED_FORMATS.get(name, "there is no such format")
    return f"{name!r} can't be used: {why}; the formats are: {', '.join(BASE_FORMATS)}"
