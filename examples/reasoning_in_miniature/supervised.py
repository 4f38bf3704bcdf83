"""Supervised training of the demo's model: pretraining, mid-training, SFT and the target.

Not for RL: see `grpo.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from chat_tokenizer import END_OF_TEXT, END_OF_TURN, chat_prompt
from gradients import set_gradient
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

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence
    from concurrent.futures import Executor

    from tokenizers import Tokenizer
    from transformers import Qwen2ForCausalLM

__all__ = [
    "PROMPT_WEIGHT",
    "Example",
    "Line",
    "SupervisedPlan",
    "draw_batch",
    "draw_texts",
    "pad_examples",
    "train",
]

PROMPT_WEIGHT = 0.1
"""Weight of a prompt token in the loss; a reply token weighs 1."""

REASONING_SHARES = (0.5, 0.3, 0.2)
"""Shares of chain, count and max: the harder to learn, the more of it."""

SLICE_SIZE = 8
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
class Line:
    """One problem, and how it is written."""

    problem: Problem
    is_worked: bool
    """Whether the reply shows its steps."""
    is_chat: bool
    """Whether it is written in ChatML."""


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenized training line: the prompt's ids, then the reply's."""

    prompt_ids: list[int]
    reply_ids: list[int]


def train(
    model: Qwen2ForCausalLM,
    tokenizer: Tokenizer,
    plan: SupervisedPlan,
    *,
    rng: random.Random,
    pool: Executor,
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
        pool: threads for the gradient.
        on_step: called after each step with its loss (nats per weighted token).
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    model.train()
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(plan, step)
        examples = [_example(tokenizer, line) for line in draw_batch(rng, plan)]
        loss = set_gradient(model, _slices(examples), pool)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        on_step(loss)
    model.eval()


def draw_batch(rng: random.Random, plan: SupervisedPlan) -> list[Line]:
    """Draw what one step trains on."""
    return [_draw_line(rng, plan) for _ in range(plan.batch_size)]


def draw_texts(rng: random.Random, plan: SupervisedPlan, count: int) -> list[str]:
    """Draw plain text of a plan's mixture, to train the tokenizer on."""
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


def _slices(examples: Sequence[Example]) -> list[tuple[Tensor, Tensor]]:
    """Pad one batch in slices of similar length, the longest first, its weights adding up to 1.

    The slices change no number but save the padding: lines of 10 and of 80 tokens are mixed.
    """
    ordered = sorted(examples, key=lambda e: -len(e.prompt_ids) - len(e.reply_ids))
    padded = [
        pad_examples(ordered[begin : begin + SLICE_SIZE], PROMPT_WEIGHT)
        for begin in range(0, len(ordered), SLICE_SIZE)
    ]
    total_weight = float(sum(weights.sum() for _, weights in padded))
    return [(input_ids, weights / total_weight) for input_ids, weights in padded]


def _draw_line(rng: random.Random, plan: SupervisedPlan) -> Line:
    problem = _draw(rng, plan)
    is_worked = _is_worked(rng, plan, problem)
    return Line(problem, is_worked, is_chat=rng.random() < plan.chat_share)


def _draw(rng: random.Random, plan: SupervisedPlan) -> Problem:
    if rng.random() < plan.other_share:
        family = rng.choice(OTHER_FAMILIES)
    else:
        (family,) = rng.choices(REASONING_FAMILIES, REASONING_SHARES)
    return draw_problem(rng, family, rng.choice(plan.wordings), "train")


def _example(tokenizer: Tokenizer, line: Line) -> Example:
    question, reply = line.problem.question, response(line.problem, is_worked=line.is_worked)
    if line.is_chat:
        prompt, reply = chat_prompt(question), reply + END_OF_TURN
    else:
        prompt, reply = question + "\n", reply + END_OF_TEXT
    return Example(tokenizer.encode(prompt).ids, tokenizer.encode(reply).ids)


def _is_worked(rng: random.Random, plan: SupervisedPlan, problem: Problem) -> bool:
    share = worked_probability(problem) if plan.worked_share is None else plan.worked_share
    return rng.random() < share


def _learning_rate(plan: SupervisedPlan, step: int) -> float:
    if step < plan.warmup_steps:
        return plan.learning_rate * (step + 1) / plan.warmup_steps
    progress = (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps)
    return plan.learning_rate * (0.1 + 0.45 * (1.0 + math.cos(math.pi * progress)))
