"""Where in a model a tensor sits, from its name: the layer, and the kind of module.

For summaries and pictures, and for recipes, which give kinds of module alphas of their own: a name
that is moved to another kind here changes what a stored recipe adds. Imports no torch.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

__all__ = ["KINDS", "Place", "place_of", "stack_of"]


class Place(NamedTuple):
    """Where a tensor sits."""

    layer: int | None
    """The first number in its name; None where there is none, as for the embedding."""
    kind: str
    """One of `KINDS`, or what its own last module is called."""


LAYER = re.compile("[0-9]{1,6}")
"""What can be a layer's number; a longer one is part of some other name."""

LEAVES = {"weight", "bias", "e_score_correction_bias"}
"""What stands after the name of the module."""

MODULES: Final[dict[str, tuple[str, ...]]] = {
    # DeepSeek's latent attention has two matrices for q, and two that k and v share.
    "q": ("q_proj", "q_a_proj", "q_b_proj", "wq"),
    "k": ("k_proj", "wk"),
    "v": ("v_proj", "wv"),
    "kv": ("kv_a_proj_with_mqa", "kv_b_proj"),
    "qkv": ("qkv_proj", "c_attn", "query_key_value", "wqkv", "Wqkv"),
    "o": ("o_proj", "out_proj", "wo", "attn.c_proj", "self_attn.dense", "attention.dense"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3", "c_fc", "fc1", "dense_h_to_4h"),
    "gate_up": ("gate_up_proj",),
    "down": ("down_proj", "w2", "mlp.c_proj", "fc2", "dense_4h_to_h"),
    "experts": (),
    "shared": (),
    "router": ("gate", "router", "shared_expert_gate"),
    "norms": ("ln_1", "ln_2", "ln_f"),
    "biases": (),
    "embedding": ("embed_tokens", "wte", "wpe", "word_embeddings", "embed_in"),
    "head": ("lm_head", "embed_out"),
}
"""Kinds in the order in which a model applies them, with the modules that are one."""

KINDS: Final = tuple(MODULES)
"""The kinds that the common families have."""

KIND_OF = {module: kind for kind, modules in MODULES.items() for module in modules}


def place_of(name: str) -> Place:
    """Find a tensor's place.

    >>> place_of("model.layers.7.self_attn.q_proj.weight")
    Place(layer=7, kind='q')
    >>> place_of("model.layers.7.mlp.experts.31.up_proj.weight")
    Place(layer=7, kind='experts')
    >>> place_of("model.embed_tokens.weight")
    Place(layer=None, kind='embedding')
    """
    parts = name.split(".")
    numbers = [part for part in parts if LAYER.fullmatch(part)]
    return Place(int(numbers[0]) if numbers else None, _kind(parts))


def stack_of(name: str) -> str | None:
    """Name the stack of layers in which a tensor sits; None for those in no layer.

    >>> stack_of("model.layers.7.self_attn.q_proj.weight")
    'model.layers'
    """
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if LAYER.fullmatch(part)]
    return ".".join(parts[: numbers[0]]) if numbers else None


def _kind(parts: list[str]) -> str:
    modules = [part for part in parts if part not in LEAVES and not LAYER.fullmatch(part)]
    if not modules:
        return "other"
    module = modules[-1]
    if "shared_expert" in parts or "shared_experts" in parts:
        return "shared"
    if "experts" in parts:
        return "experts"
    if "norm" in module.lower():
        return "norms"
    kind = KIND_OF.get(module) or KIND_OF.get(".".join(modules[-2:]))
    if parts[-1] == "bias" and kind not in {"norms", "router"}:
        return "biases"
    return kind or module
