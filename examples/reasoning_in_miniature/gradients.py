"""Gradients of weighted token losses, slice by slice on as many threads as there are cores.

Not for choosing weights: `supervised.py` weighs tokens by what they are, `grpo.py` by advantage.

One thread for each slice, and not torch's own threads: those gain a seventh on matrices as small as
these, two slices at a time nearly a half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Executor

    from transformers import Qwen2ForCausalLM

__all__ = ["set_gradient", "token_losses"]


def set_gradient(
    model: Qwen2ForCausalLM, slices: Sequence[tuple[Tensor, Tensor]], pool: Executor
) -> float:
    """Set every `.grad` to the gradient of sum(weights * -log p), and return that sum.

    The slices are added up in their order: the number of threads changes no bit.

    Args:
        model: float32 model on the CPU.
        slices: pairs of `input_ids` int64 and `weights` float32, both [batch, length].
        pool: threads that take a slice each.
    """
    parameters = list(model.parameters())

    def differentiate(piece: tuple[Tensor, Tensor]) -> tuple[float, tuple[Tensor, ...]]:
        input_ids, weights = piece
        loss = (token_losses(model, input_ids) * weights).sum()
        return loss.item(), torch.autograd.grad(loss, parameters)

    model.zero_grad(set_to_none=True)
    total = 0.0
    for loss, gradients in pool.map(differentiate, slices):
        total += loss
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
    return total


def token_losses(model: Qwen2ForCausalLM, input_ids: Tensor) -> Tensor:
    """Compute -log p of every token given those before it, in nats.

    Args:
        model: float32 model on the CPU.
        input_ids: int64 [batch, length], padded on the right.

    Returns:
        float32 [batch, length], 0 in the first column.
    """
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    losses = functional.cross_entropy(
        logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none"
    )
    return functional.pad(losses.view(input_ids.shape[0], -1), (1, 0))
