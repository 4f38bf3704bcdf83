"""Checkpoints of a real model's shape, and their vectors: random weights, written one by one."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch

from vllm_rvec.checkpoint.reader import CheckpointReader
from vllm_rvec.checkpoint.writer import ShardWriter
from vllm_rvec.vector.extract import extract

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["make_checkpoints", "make_files"]

QWEN2_0_5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
}

TINY = QWEN2_0_5B | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "vocab_size": 256,
}

SEVEN_B = QWEN2_0_5B | {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
"""Matrices of Llama-2-7B's sizes (arXiv:2307.09288); what a load costs in a large model."""

SEVEN_B_8K = SEVEN_B | {"vocab_size": 8192}
"""The same with a head that is small beside few layers, as it is beside many."""

SHAPES = {"7b": SEVEN_B, "7b-8k": SEVEN_B_8K, "0.5b": QWEN2_0_5B, "tiny": TINY}

INITIAL_DEVIATION, TUNED_DEVIATION = 0.02, 0.0005


STEPPED_SHARE = 0.1
"""Of the weights that the sparse vector changes. RL alone changes 5 to 30 % (arXiv:2505.11711)."""


def make_files(folder: Path, layers: int, shape: str) -> None:
    """Make what `benchmarks.files.Files` names: donors, target, vectors."""
    folder.mkdir(parents=True, exist_ok=True)
    base, tuned, _ = make_checkpoints(folder, layers, ("base", "tuned", "target"), shape)
    extract(tuned, base, folder / "dense", dtype="bfloat16", encoding="dense")
    extract(tuned, base, folder / "int8", encoding="int8")
    stepped = folder / "stepped"
    _make_stepped(base, stepped)
    extract(stepped, base, folder / "sparse")
    shutil.rmtree(stepped)


def make_checkpoints(
    folder: Path, layers: int, names: tuple[str, ...], shape: str = "0.5b"
) -> list[Path]:
    """Write bf16 checkpoints of one family: one initialisation, tuned in different directions.

    Args:
        folder: Where they go, each in a folder of its own.
        layers: Of each; 24 of 0.5b are Qwen2-0.5B, 988 MB.
        names: Their folders' names. The first is the initialisation itself; all others differ from
            it, and from each other, in most weights.
        shape: One of `SHAPES`.
    """
    config = SHAPES[shape] | {"num_hidden_layers": layers}
    for seed, name in enumerate(names):
        _make_checkpoint(folder / name, config, seed)
    return [folder / name for name in names]


def _make_checkpoint(folder: Path, config: dict[str, Any], seed: int) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    first, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    shapes = dict(_shapes(config))
    with ShardWriter(folder / "model.safetensors", shapes.items(), {"format": "pt"}) as file:
        for name, shape in shapes.items():
            weights = torch.randn(shape, generator=first) * INITIAL_DEVIATION
            if seed:
                weights.add_(torch.randn(shape, generator=own), alpha=TUNED_DEVIATION)
            file.write(name, weights.bfloat16())
        file.finish()


def _make_stepped(base: Path, folder: Path) -> None:
    """Move a share of a checkpoint's weights to the next bf16 number, up or down."""
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    reader, generator = CheckpointReader(base), torch.Generator().manual_seed(0)
    shapes = {name: info.shape for name, info in reader.table.items()}
    with ShardWriter(folder / "model.safetensors", shapes.items(), {"format": "pt"}) as file:
        for name in shapes:
            file.write(name, _step(reader.tensor(name), generator))
        file.finish()


def _step(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    draw = torch.rand(weights.shape, generator=generator)
    # The next number of a float's format has the next integer as its bits; below zero is NaN.
    bits, half = weights.view(torch.int16), STEPPED_SHARE / 2
    up, down = draw < half, (draw > 1 - half) & (weights != 0)
    return (bits + up.to(torch.int16) - down.to(torch.int16)).view(weights.dtype)


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (rows, hidden)
            yield f"{prefix}.self_attn.{name}_proj.bias", (rows,)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
