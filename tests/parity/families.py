"""Donors and a target of the architectures that parity is shown for: tiny, seeded, bf16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.support.checkpoints import Family

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

__all__ = ["KINDS", "make_family"]

KINDS = ("qwen2", "llama", "qwen2 tied")

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 352,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}

DRIFT = 1 / 32
"""What tuning moves a weight by, in standard deviations of its tensor: much more than it does, so
that sums are rounded in many places."""


def make_family(folder: Path, kind: str) -> Family:
    """Write three checkpoints of one initialisation; one of `KINDS`."""
    torch.manual_seed(0)
    model = _model(kind).to(torch.bfloat16)
    first = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
    for seed, name in enumerate(("base", "tuned", "target")):
        generator = torch.Generator().manual_seed(seed)
        for tensor, parameter in model.named_parameters():
            step = torch.randn(parameter.shape, generator=generator) * (0.02 * DRIFT)
            parameter.data.copy_(first[tensor].float() + (step if seed else 0))
        model.save_pretrained(folder / name)
    return Family(folder / "tuned", folder / "base", folder / "target")


def _model(kind: str) -> Any:
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=kind == "qwen2 tied"))
