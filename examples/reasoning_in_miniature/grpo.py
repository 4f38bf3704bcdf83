"""GRPO on the demo's model: group-standardised advantages, on policy, without a KL term.

After DeepSeekMath (arXiv:2402.03300). One gradient step per set of samples, so that the ratio of
new to old policy is 1 and its clipping never acts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from chat_tokenizer import chat_prompt
from gradients import set_gradient
from sampling import Reply, generate, score
from supervised import Example, pad_examples
from tasks import REASONING_FAMILIES, Problem, Wording, draw_problem
from torch import Tensor

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence
    from concurrent.futures import Executor

    from tokenizers import Tokenizer
    from transformers import Qwen2ForCausalLM

__all__ = ["GrpoPlan", "advantages", "draw_step", "train"]

SLICE_SIZE = 32
"""Samples per forward pass of the update."""


@dataclass(frozen=True, slots=True)
class GrpoPlan:
    """How theta_SFT becomes theta_GRPO."""

    steps: int
    prompts_per_step: int
    """Shared out evenly over the reasoning families."""
    samples_per_prompt: int
    learning_rate: float
    """Constant. At 3e-4 a weak base diverged."""
    temperature: float
    wording: Wording


def train(
    model: Qwen2ForCausalLM,
    tokenizer: Tokenizer,
    plan: GrpoPlan,
    *,
    rng: random.Random,
    pool: Executor,
    on_step: Callable[[float], None],
) -> None:
    """Train the model in place, in float32; the reward is an exact and ended answer.

    Args:
        model: theta_SFT, float32 on the CPU.
        tokenizer: the demo's tokenizer.
        plan: numbers of steps, prompts and samples.
        rng: draws the problems and seeds the sampling.
        pool: threads for sampling and gradient.
        on_step: called after each step with its mean reward.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    model.eval()
    for _ in range(plan.steps):
        examples, rewards = _sample(model, tokenizer, plan, rng, pool)
        set_gradient(model, _slices(examples, advantages(rewards).flatten()), pool)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        on_step(rewards.mean().item())


def advantages(rewards: Tensor) -> Tensor:
    """Standardise rewards within each group; a group of equal rewards teaches nothing.

    Args:
        rewards: float32 [prompts, samples].

    Returns:
        float32 of the same shape, zero mean in every row.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + 1e-4)


def draw_step(rng: random.Random, plan: GrpoPlan) -> tuple[list[Problem], int]:
    """Draw what one step asks, and the seed of its samples."""
    families = [
        REASONING_FAMILIES[index % len(REASONING_FAMILIES)]
        for index in range(plan.prompts_per_step)
    ]
    problems = [draw_problem(rng, family, plan.wording, "train") for family in families]
    return problems, rng.getrandbits(62)


def _sample(
    model: Qwen2ForCausalLM,
    tokenizer: Tokenizer,
    plan: GrpoPlan,
    rng: random.Random,
    pool: Executor,
) -> tuple[list[Example], Tensor]:
    """Draw problems and sample replies; rewards are float32 [prompts, samples]."""
    problems, seed = draw_step(rng, plan)
    repeated = [problem for problem in problems for _ in range(plan.samples_per_prompt)]
    prompts = [tokenizer.encode(chat_prompt(problem.question)).ids for problem in repeated]
    replies: list[Reply] = generate(
        model,
        tokenizer,
        prompts,
        pool=pool,
        temperature=plan.temperature,
        seed=seed,
    )
    rewards = torch.tensor(
        [float(score(reply, problem)) for reply, problem in zip(replies, repeated, strict=True)]
    )
    examples = [
        Example(prompt, reply.token_ids) for prompt, reply in zip(prompts, replies, strict=True)
    ]
    return examples, rewards.view(plan.prompts_per_step, plan.samples_per_prompt)


def _slices(examples: Sequence[Example], advantage: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Weigh the reply tokens so that the loss is -sum(advantage * log p) / number of reply tokens.

    Args:
        examples: prompts and sampled replies; those of no advantage are left out.
        advantage: float32 [len(examples)].

    Returns:
        Slices of similar length for `set_gradient`, the longest first.
    """
    total_tokens = sum(len(example.reply_ids) for example in examples)
    order = sorted(
        (index for index in range(len(examples)) if advantage[index] != 0.0),
        key=lambda index: -len(examples[index].prompt_ids) - len(examples[index].reply_ids),
    )
    slices = []
    for begin in range(0, len(order), SLICE_SIZE):
        indices = order[begin : begin + SLICE_SIZE]
        input_ids, is_reply = pad_examples([examples[i] for i in indices], prompt_weight=0.0)
        slices.append((input_ids, is_reply * advantage[indices][:, None] / total_tokens))
    return slices
