"""Targets as quantizers write them: their names, dtypes and configuration, with made-up codes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from tests.support.checkpoints import tensors
from tests.support.variations import with_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["QUANTIZERS", "int8_copy", "quantized_copy"]

QUANTIZERS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "int-quantized"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]},
}
"""What their config.json says."""


def quantized_copy(
    checkpoint: Path, folder: Path, method: str, *, only: str = "_proj.weight"
) -> Path:
    """Copy a checkpoint with its projections in the layout of a quantizer.

    Args:
        checkpoint: A bf16 one.
        folder: Where to.
        method: One of `QUANTIZERS`.
        only: What is in the names of the tensors that are quantized.
    """
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors(checkpoint).items():
        if only in name and name.endswith("_proj.weight"):
            stored.update(_codes(name.removesuffix(".weight"), tensor, method))
        else:
            stored[name] = tensor
    with_tensors(checkpoint, folder, stored)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": QUANTIZERS[method]}
    path.write_text(json.dumps(config))
    return folder


def int8_copy(checkpoint: Path, folder: Path) -> Path:
    """Copy a checkpoint with its projections as int8, rounded to nearest, one scale a row.

    Real codes, which compressed-tensors' kernels run on a CPU.
    """
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors(checkpoint).items():
        stored[name] = tensor
        if name.endswith("_proj.weight"):
            scales = tensor.float().abs().amax(1, keepdim=True) / 127
            stored[name] = torch.round(tensor.float() / scales).to(torch.int8)
            stored[f"{name}_scale"] = scales.to(torch.bfloat16)
    with_tensors(checkpoint, folder, stored)
    codes = {"num_bits": 8, "type": "int", "symmetric": True}
    layers = {
        "targets": ["Linear"],
        "weights": {**codes, "strategy": "channel", "dynamic": False},
        "input_activations": {**codes, "strategy": "token", "dynamic": True},
    }
    said = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": layers},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))
    return folder


def _codes(module: str, weight: torch.Tensor, method: str) -> Iterator[tuple[str, torch.Tensor]]:
    rows, columns = weight.shape
    scales = torch.ones(rows, 1)
    match method:
        case "gptq" | "awq":
            yield f"{module}.qweight", torch.zeros(columns // 8, rows, dtype=torch.int32)
            yield f"{module}.qzeros", torch.zeros(columns // 64, rows // 8, dtype=torch.int32)
            yield f"{module}.scales", torch.ones(columns // 64, rows, dtype=torch.float16)
        case "fp8":
            yield f"{module}.weight", weight.to(torch.float8_e4m3fn)
            yield f"{module}.weight_scale", scales
        case "compressed-tensors":
            yield f"{module}.weight", weight.to(torch.int8)
            yield f"{module}.weight_scale", scales
        case "bitsandbytes":
            yield f"{module}.weight", torch.zeros(rows * columns // 2, 1, dtype=torch.uint8)
            yield f"{module}.weight.absmax", scales.flatten()
        case "mxfp4":
            yield f"{module}_blocks", torch.zeros(rows, columns // 32, 16, dtype=torch.uint8)
            yield f"{module}_scales", torch.zeros(rows, columns // 32, dtype=torch.uint8)
