"""Tiny seeded checkpoints, made by transformers, with the layout of real ones."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from vllm_rvec.vector.extract import extract

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["Family", "make_checkpoint", "make_family", "make_merged", "make_vector", "tensors"]


@dataclass(frozen=True, slots=True)
class Family:
    """Two donors and a target of one architecture."""

    tuned: Path
    base: Path
    target: Path


def make_checkpoint(
    folder: Path,
    *,
    seed: int,
    noise: float = 0.0,
    noise_seed: int = 1000,
    tied: bool = True,
    layers: int = 2,
) -> Path:
    """Write a tiny bf16 Qwen2; `noise` moves every weight of that seed by a random step."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=128,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    if noise:
        generator = torch.Generator().manual_seed(noise_seed)
        for parameter in model.parameters():
            step = torch.randn(parameter.shape, generator=generator) * noise
            parameter.data.add_(step.to(parameter.dtype))
    model.save_pretrained(folder)
    return folder


def make_family(folder: Path, *, tied: bool = True) -> Family:
    """Write donors and a target that differ by noise: three ways from one initialisation."""
    return Family(
        tuned=make_checkpoint(folder / "tuned", seed=0, noise=0.02, tied=tied),
        base=make_checkpoint(folder / "base", seed=0, tied=tied),
        target=make_checkpoint(folder / "target", seed=0, noise=0.02, noise_seed=2, tied=tied),
    )


def make_vector(family: Family, folder: Path, dtype: str = "float32") -> Path:
    """Extract the family's vector."""
    return extract(family.tuned, family.base, folder, dtype=dtype, encoding="dense").output


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a single-file checkpoint or vector by safetensors' own reader."""
    (shard,) = folder.glob("*.safetensors")
    return load_file(shard)


def make_merged(
    target: Path,
    vector: Path,
    alpha: float,
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    named: Callable[[str], str] = str,
) -> Path:
    """Merge to disk by the reference formula, written out here without the package's own code.

    Args:
        target: A checkpoint of one file.
        vector: A vector, dense and of one file.
        alpha: Its coefficient.
        folder: Where to; must not exist.
        dtype: What to round to; each tensor's own where None.
        named: Gives the vector's name for a target's tensor.
    """
    shutil.copytree(target, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    v = tensors(vector)
    factor = torch.tensor(alpha, dtype=torch.float32)
    merged = {}
    for name, theta in tensors(target).items():
        part = v.get(named(name))
        fused = theta if part is None else theta.float() + factor * part.float()
        merged[name] = fused.to(dtype or theta.dtype)
    save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
