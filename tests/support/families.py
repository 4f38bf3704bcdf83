"""Tiny models of many architectures, in the layout that their published checkpoints have.

One table: the tests of loader and merge go through it, and the documents' table is held to it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.support.checkpoints import Family, tensors
from tests.support.variations import with_tensors

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "KINDS",
    "Kind",
    "language_name",
    "language_part",
    "make_families",
    "make_family",
    "recast",
    "write_shards",
]

SIZES: Final[dict[str, Any]] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
"""What all have, unless they say otherwise. Heads and widths can be halved: tensor parallel 2."""

DRIFT: Final = 0.25
"""What donors and target moved by, in standard deviations of each tensor: enough that a vector
changes what a tiny model says."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One architecture."""

    model_type: str
    """transformers' name."""
    config: dict[str, Any] = field(default_factory=dict)
    """What differs from `SIZES`; of a multimodal model, the whole configuration."""
    is_multimodal: bool = False
    """Whether `config` has parts."""
    published: dict[str, str] = field(default_factory=dict)
    """Prefixes that transformers writes otherwise than the published checkpoints have them."""
    early: frozenset[str] = frozenset()
    """Operations for which sums have to be computed before they are copied."""


LATENT: Final = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
}
"""Latent attention and experts, as DeepSeek's."""

WIDE_HEADS: Final = {"head_dim": 32}
GEMMA: Final = {**WIDE_HEADS, "query_pre_attn_scalar": 32, "sliding_window": 16}

SEES: Final = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 14,
}
"""A vision tower."""

KINDS: Final = {
    "qwen2": Kind("qwen2", {"tie_word_embeddings": False}),
    "qwen2-tied": Kind("qwen2", {"tie_word_embeddings": True}),
    "qwen3": Kind("qwen3", {**WIDE_HEADS, "tie_word_embeddings": True}),
    "llama": Kind("llama", {"tie_word_embeddings": False}),
    "llama-biases": Kind("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": Kind("mistral", {"sliding_window": 16}),
    "gemma2": Kind("gemma2", GEMMA),
    "gemma3": Kind("gemma3_text", GEMMA),
    "phi3": Kind("phi3"),
    "olmo2": Kind("olmo2"),
    "qwen3-moe": Kind(
        "qwen3_moe",
        {
            **WIDE_HEADS,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "decoder_sparse_step": 1,
        },
    ),
    "mixtral": Kind("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek-v2": Kind("deepseek_v2", {**LATENT, "topk_method": "greedy"}),
    "deepseek-v3": Kind("deepseek_v3", {**LATENT, "topk_method": "noaux_tc"}),
    "gpt-oss": Kind(
        "gpt_oss",
        {**WIDE_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
        early=frozenset({"aten.clone.default"}),
    ),
    "llama4": Kind(
        "llama4_text",
        {
            **WIDE_HEADS,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 128,
            "interleave_moe_layer_step": 1,
        },
        early=frozenset({"aten.clone.default"}),
    ),
    "gpt-neox": Kind("gpt_neox"),
    "gpt2": Kind("gpt2", {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "paligemma": Kind(
        "paligemma",
        {
            "text_config": {"model_type": "gemma", **SIZES, **WIDE_HEADS},
            "vision_config": {"model_type": "siglip_vision_model", **SEES},
            "image_token_id": 500,
            "projection_dim": 128,
            "hidden_size": 128,
        },
        is_multimodal=True,
        published={"vision_tower.": "vision_tower.vision_model."},
    ),
    "idefics3": Kind(
        "idefics3",
        {
            "text_config": {"model_type": "llama", **SIZES, "tie_word_embeddings": False},
            "vision_config": SEES,
            "image_token_id": 500,
            "scale_factor": 2,
            "tie_word_embeddings": False,
        },
        is_multimodal=True,
    ),
}


def make_family(
    folder: Path,
    kind: Kind,
    *,
    drift: float = DRIFT,
    **sizes: Any,
) -> Family:
    """Write donors and a target, bf16: the base is an initialisation, the others moved from it.

    Args:
        folder: Where to; gets three folders.
        kind: One of `KINDS`.
        drift: What they moved by, in standard deviations of each tensor.
        sizes: Other sizes than the kind's.
    """
    family = Family(folder / "tuned", folder / "base", folder / "target")
    _write_model(family.base, kind, sizes)
    base = _roughened(_as_published(tensors(family.base), kind))
    config = (family.base / "config.json").read_bytes()
    for seed, side in enumerate((family.base, family.tuned, family.target)):
        side.mkdir(exist_ok=True)
        (side / "config.json").write_bytes(config)
        save_file(
            _moved(base, seed, drift) if seed else base,
            side / "model.safetensors",
            metadata={"format": "pt"},
        )
    return family


def make_families(folder: Path) -> dict[str, Family]:
    """Write all of `KINDS`: before vLLM loads any, for it changes classes of transformers."""
    return {name: make_family(folder / name, kind) for name, kind in KINDS.items()}


def language_part(family: Family, folder: Path) -> Family:
    """Copy the language parts of multimodal donors as models of their own; the target stays."""
    sides = []
    for side in (family.tuned, family.base):
        config = json.loads((side / "config.json").read_text())
        part = config["text_config"]
        stored = {
            name: tensor
            for n, tensor in tensors(side).items()
            if (name := language_name(n)) is not None
        }
        whole = with_tensors(side, folder / side.name, stored)
        known = AutoConfig.for_model(**part)
        architecture = type(AutoModelForCausalLM.from_config(known)).__name__
        tied = {"tie_word_embeddings": config["tie_word_embeddings"]}
        (whole / "config.json").write_text(
            json.dumps(part | tied | {"architectures": [architecture]})
        )
        sides.append(whole)
    tuned, base = sides
    return Family(tuned, base, family.target)


def language_name(name: str) -> str | None:
    """Return the name that a multimodal model's tensor has in a language model; None elsewhere.

    Written out here, for these two families, without the package's own code.
    """
    if name.startswith(("model.text_model.", "lm_head.")):
        return name.replace("text_model.", "", 1)
    return name.removeprefix("language_model.") if name.startswith("language_model.") else None


def recast(family: Family, folder: Path, dtype: torch.dtype) -> Family:
    """Copy donors and target in another dtype."""
    sides = [
        with_tensors(side, folder / side.name, {n: t.to(dtype) for n, t in tensors(side).items()})
        for side in (family.tuned, family.base, family.target)
    ]
    return Family(*sides)


def write_shards(checkpoint: Path, folder: Path, count: int) -> Path:
    """Copy a checkpoint into several shards, names dealt out in an order of their own."""
    stored = tensors(checkpoint)
    folder.mkdir()
    (folder / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    names = sorted(stored, key=lambda name: name[::-1])
    weight_map: dict[str, str] = {}
    for i in range(count):
        shard = f"model-{count - i:05}-of-{count:05}.safetensors"
        part = {name: stored[name] for name in names[i::count]}
        save_file(part, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _write_model(folder: Path, kind: Kind, sizes: dict[str, Any]) -> None:
    """Have transformers write a model, so that names and shapes are a published checkpoint's."""
    torch.manual_seed(0)
    given = {**kind.config, **sizes} if kind.is_multimodal else {**SIZES, **kind.config, **sizes}
    config = AutoConfig.for_model(kind.model_type, **given)
    auto = AutoModelForImageTextToText if kind.is_multimodal else AutoModelForCausalLM
    auto.from_config(config).to(torch.bfloat16).save_pretrained(folder)


def _as_published(stored: dict[str, torch.Tensor], kind: Kind) -> dict[str, torch.Tensor]:
    """Give tensors the names and dtypes that the published checkpoints have."""
    renamed = dict(stored)
    for ours, theirs in kind.published.items():
        for name in [name for name in renamed if name.startswith(ours)]:
            renamed[theirs + name.removeprefix(ours)] = renamed.pop(name)
    return {
        name: tensor.float() if name.endswith("e_score_correction_bias") else tensor
        for name, tensor in renamed.items()
    }


def _roughened(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Move every weight a little: norms and biases are born all alike, and would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (tensor.float() + torch.randn(tensor.shape, generator=generator) * 0.1).to(
            tensor.dtype
        )
        for name, tensor in sorted(stored.items())
    }


def _moved(stored: dict[str, torch.Tensor], seed: int, drift: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, tensor in sorted(stored.items()):
        step = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * drift
        moved[name] = (tensor.float() + step).to(tensor.dtype)
    return moved
