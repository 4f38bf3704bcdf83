"""Supervised training of the demo's model: pretraining, mid-training, SFT and the target.

Not for RL: see `grpo.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from chat_tokenizer import END_OF_TEXT, END_OF_TURN, chat_prompt
from tasks import (
    OTHER_FAMILIES,
    REASONING_FAMILIES,
    Problem,
    Wording,
    draw_problem,
    response,
    worked_probability,
)
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from tokenizers import Tokenizer
    from transformers import Qwen2ForCausalLM

__all__ = [
    "PROMPT_WEIGHT",
    "Example",
    "SupervisedPlan",
    "draw_lines",
    "pad_examples",
    "token_losses",
    "train",
]

PROMPT_WEIGHT = 0.1
"""Weight of a prompt token in the loss; a reply token weighs 1."""

REASONING_SHARES = (0.5, 0.3, 0.2)
"""Shares of chain, count and max: the harder to learn, the more of it."""

SLICE_SIZE = 16
"""Lines per forward pass."""


@dataclass(frozen=True, slots=True)
class SupervisedPlan:
    """What one supervised stage trains on and how."""

    steps: int
    batch_size: int
    learning_rate: float
    """Peak, in AdamW's units; falls along a cosine to a tenth of it."""
    warmup_steps: int
    wordings: tuple[Wording, ...]
    other_share: float
    """Share of problems from the families without a worked solution."""
    chat_share: float
    """Share of examples written in ChatML; the rest is plain text."""
    worked_share: float | None
    """Share of worked replies; None takes `tasks.worked_probability`."""


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenized training line: the prompt's ids, then the reply's."""

    prompt_ids: list[int]
    reply_ids: list[int]


def train(
    model: Qwen2ForCausalLM,
    tokenizer: Tokenizer,
    plan: SupervisedPlan,
    rng: random.Random,
    on_step: Callable[[float], None],
) -> None:
    """Train the model in place, in float32.

    bf16 autocast would be 13 times slower on a processor without bf16 instructions (measured on
    an AVX2 EPYC: 9.7 against 0.7 seconds for a step of 64 lines).

    Args:
        model: float32 model on the CPU.
        tokenizer: the demo's tokenizer.
        plan: data mixture and optimiser settings.
        rng: draws every problem; the only randomness here.
        on_step: called after each step with its loss (nats per weighted token).
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    model.train()
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(plan, step)
        examples = [_draw_example(rng, tokenizer, plan) for _ in range(plan.batch_size)]
        optimizer.zero_grad(set_to_none=True)
        loss = _accumulate_gradient(model, examples)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        on_step(loss)
    model.eval()


def draw_lines(rng: random.Random, plan: SupervisedPlan, count: int) -> list[str]:
    """Draw plain lines of a plan's mixture, to train the tokenizer on."""
    problems = [_draw(rng, plan) for _ in range(count)]
    return [f"{p.question}\n{response(p, is_worked=_is_worked(rng, plan, p))}" for p in problems]


def pad_examples(examples: Sequence[Example], prompt_weight: float) -> tuple[Tensor, Tensor]:
    """Pad to the longest example, on the right, where a causal model needs no mask.

    Returns:
        `input_ids` int64 and `weights` float32, both [batch, length]. `weights[i, j]` weighs the
        prediction of token j: 0 for padding and for the first token.
    """
    length = max(len(e.prompt_ids) + len(e.reply_ids) for e in examples)
    input_ids = torch.zeros(len(examples), length, dtype=torch.long)
    weights = torch.zeros(len(examples), length)
    for row, example in enumerate(examples):
        begin = len(example.prompt_ids)
        end = begin + len(example.reply_ids)
        input_ids[row, :end] = torch.tensor(example.prompt_ids + example.reply_ids)
        weights[row, 1:begin] = prompt_weight
        weights[row, begin:end] = 1.0
    return input_ids, weights


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


def _accumulate_gradient(model: Qwen2ForCausalLM, examples: Sequence[Example]) -> float:
    """Add one batch's gradient, in slices of similar length, and return the batch's mean loss.

    The slices change no number but save the padding: lines of 10 and of 80 tokens are mixed.
    """
    ordered = sorted(examples, key=lambda e: len(e.prompt_ids) + len(e.reply_ids))
    padded = [
        pad_examples(ordered[begin : begin + SLICE_SIZE], PROMPT_WEIGHT)
        for begin in range(0, len(ordered), SLICE_SIZE)
    ]
    total_weight = float(sum(weights.sum() for _, weights in padded))
    mean_loss = 0.0
    for input_ids, weights in padded:
        loss = (token_losses(model, input_ids) * weights).sum() / total_weight
        loss.backward()  # type: ignore[no-untyped-call]
        mean_loss += loss.item()
    return mean_loss


def _draw(rng: random.Random, plan: SupervisedPlan) -> Problem:
    if rng.random() < plan.other_share:
        family = rng.choice(OTHER_FAMILIES)
    else:
        (family,) = rng.choices(REASONING_FAMILIES, REASONING_SHARES)
    return draw_problem(rng, family, rng.choice(plan.wordings), "train")


def _draw_example(rng: random.Random, tokenizer: Tokenizer, plan: SupervisedPlan) -> Example:
    problem = _draw(rng, plan)
    reply = response(problem, is_worked=_is_worked(rng, plan, problem))
    if rng.random() < plan.chat_share:
        prompt, reply = chat_prompt(problem.question), reply + END_OF_TURN
    else:
        prompt, reply = problem.question + "\n", reply + END_OF_TEXT
    return Example(tokenizer.encode(prompt).ids, tokenizer.encode(reply).ids)


def _is_worked(rng: random.Random, plan: SupervisedPlan, problem: Problem) -> bool:
    share = worked_probability(problem) if plan.worked_share is None else plan.worked_share
    return rng.random() < share


def _learning_rate(plan: SupervisedPlan, step: int) -> float:
    if step < plan.warmup_steps:
        return plan.learning_rate * (step + 1) / plan.warmup_steps
    progress = (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps)
    return plan.learning_rate * (0.1 + 0.45 * (1.0 + math.cos(math.pi * progress)))
