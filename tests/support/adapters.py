"""Real PEFT adapters on tiny models, with factors that are not zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["make_adapter", "make_gpt2", "make_qwen2", "merged_by_peft"]


def make_qwen2(folder: Path, *, tied: bool = False) -> Path:
    """Write a tiny Qwen2, float32."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=48,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    Qwen2(config).save_pretrained(folder)
    return folder


def make_gpt2(folder: Path) -> Path:
    """Write a tiny GPT-2, float32: its weights are `[in, out]`."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, **config: Any) -> Path:
    """Make an adapter as a training would leave it: every trained weight is random."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            step = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.add_(step.to(parameter.dtype))
    adapted.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Merge an adapter by PEFT's own `merge_and_unload`, in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    tensors: dict[str, torch.Tensor] = merged.state_dict()
    return tensors
