"""v = theta_GRPO - theta_SFT as tensors in memory, its controls, and target + alpha * v.

Not the stored vector: that is `vllm_rvec.vector`. The numerics are the same.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import Qwen2ForCausalLM

__all__ = ["difference", "fused", "norm", "parameters", "permuted", "random_like"]


def parameters(model: Qwen2ForCausalLM) -> dict[str, Tensor]:
    """The model's parameters by name; a tied head is not listed beside its embedding."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def difference(tuned: Qwen2ForCausalLM, base: Qwen2ForCausalLM) -> dict[str, Tensor]:
    """Compute v = tuned - base in float32 and round it to bf16, held as float32."""
    subtrahend = parameters(base)
    return {
        name: (minuend - subtrahend[name]).bfloat16().float()
        for name, minuend in parameters(tuned).items()
    }


def random_like(vector: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Draw Gaussian tensors, each with the norm of its counterpart in v."""
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(v.shape, generator=generator) for name, v in vector.items()}
    return {name: n * (vector[name].norm() / n.norm()) for name, n in noise.items()}


def permuted(vector: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Shuffle the entries of v within each tensor: the same values, in places that mean nothing."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: v.flatten()[torch.randperm(v.numel(), generator=generator)].view_as(v)
        for name, v in vector.items()
    }


@torch.no_grad()
def fused(target: Qwen2ForCausalLM, vector: Mapping[str, Tensor], alpha: float) -> Qwen2ForCausalLM:
    """Return a copy with theta + alpha * v: float32 arithmetic, one rounding to bf16."""
    model = copy.deepcopy(target)
    if alpha != 0.0:
        for name, parameter in model.named_parameters():
            parameter.copy_((parameter + alpha * vector[name]).bfloat16())
    return model


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Frobenius norm of all tensors together."""
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors.values()))
