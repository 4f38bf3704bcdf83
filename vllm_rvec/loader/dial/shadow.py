"""A second model whose parameters are v: made, filled, and free of what a model that answers needs.

It has the target's class and layout without quantization. Its attention layers are not vLLM's
business: they are kept out of the registry in which vLLM finds those that have a cache.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from vllm_rvec.errors import ConfigError
from vllm_rvec.loader.vllm_api import (
    CompilationMode,
    initialize_model,
    set_default_torch_dtype,
)

if TYPE_CHECKING:
    from torch import nn

    from vllm_rvec.loader.dial.loading import VectorStream
    from vllm_rvec.loader.vllm_api import ModelConfig, VllmConfig

__all__ = ["create_shadow", "fill_shadow"]


def create_shadow(vllm_config: VllmConfig, model_config: ModelConfig) -> nn.Module:
    """Make a model of the target's class, not quantized, all of its parameters zero."""
    config: Any = copy.copy(vllm_config)
    config.model_config = copy.copy(model_config)
    config.model_config.quantization = None
    config.quant_config = None
    config.compilation_config = copy.copy(vllm_config.compilation_config)
    config.compilation_config.mode = CompilationMode.NONE
    config.compilation_config.static_forward_context = {}
    config.compilation_config.static_all_moe_layers = []
    device = torch.device(vllm_config.load_config.device or vllm_config.device_config.device)
    with set_default_torch_dtype(model_config.dtype), device:
        model: nn.Module = initialize_model(vllm_config=config, model_config=config.model_config)
    for parameter in model.parameters():
        # Fresh zeros, which the system gives: what nothing is written to takes no memory, and what
        # is written to is not written twice.
        parameter.data = torch.zeros(
            parameter.shape, dtype=parameter.dtype, device=parameter.device
        )
    return model


def fill_shadow(shadow: nn.Module, weights: VectorStream) -> None:
    """Load v, by the weight loaders of the model's class.

    Args:
        shadow: From `create_shadow`.
        weights: v by the checkpoint's names.

    Raises:
        ConfigError: v does not fit, or a weight loader did something with a tensor that is not
            known to commute with sums.
    """
    try:
        shadow.load_weights(iter(weights))  # type: ignore[operator]  # vLLM's models have it
    except (AssertionError, KeyError, ValueError) as exc:
        # Only where the check could not compare names: the target stores them as codes.
        raise ConfigError(
            f"the vector can't be loaded as {type(shadow).__name__}",
            why=f"{type(exc).__name__}: {exc}",
            fix="check that vector and target belong together: vllm-rvec check",
        ) from exc
    if not (early := weights.computed_early):
        return
    raise ConfigError(
        f"{len(early)} tensors are changed on their way into {type(shadow).__name__}",
        problems=[f"{name}: {what}" for name, what in early.items()],
        why="what becomes of theta + alpha v is then not known to be what becomes of theta plus "
        "alpha times what becomes of v",
        fix="use --mode fused",
    )
