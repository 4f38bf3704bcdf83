"""Measure target + alpha * v on held-out problems, with the controls that make it mean something.

Not for the served model: that is `vllm_rvec.evaluation`. Here everything runs in transformers.
"""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from sampling import Reply, ask, score
from tasks import OTHER_FAMILIES, Family, Problem, draw_distinct
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console
    from tokenizers import Tokenizer
    from transformers import Qwen2ForCausalLM

__all__ = ["Accuracy", "Arm", "Evaluation", "evaluate", "paired_gain", "wilson_interval"]

GROUPS: dict[str, tuple[tuple[Family, ...], int]] = {
    "chain": (("chain",), 600),
    "count": (("count",), 300),
    "max": (("max",), 300),
    "other": (OTHER_FAMILIES, 300),
}
"""What is asked: families, and how many problems of them in all."""

Z_95 = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Correct answers out of those asked, with a 95 % Wilson interval."""

    correct: int
    asked: int
    accuracy: float
    interval_95: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of asking: which vector, how much of it, and whether steps are forced."""

    name: str
    alpha: float
    vector: str
    """`v`, or `random`: Gaussian, with the norm of v in every tensor."""
    is_forced_to_work: bool
    accuracy: dict[str, Accuracy]
    works_share: float
    """Share of the chain replies that show steps."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `results.json` holds of the evaluation."""

    wording: str
    split: str
    decoding: str
    arms: list[Arm]
    chain_gain_points: float
    """Accuracy at alpha 1 less that at alpha 0 on the same chain problems, in points."""
    chain_gain_interval_95_points: tuple[float, float]
    chain_replies_that_differ: float
    """Share of chain problems with another reply at alpha 1 than at alpha 0."""
    vector_norm_over_base_norm: float
    unchanged_weights_share: float
    """Share of bf16 weights that GRPO left bit-equal."""


def evaluate(
    target: Qwen2ForCausalLM,
    tuned: Qwen2ForCausalLM,
    base: Qwen2ForCausalLM,
    *,
    tokenizer: Tokenizer,
    seed: int,
    console: Console,
) -> Evaluation:
    """Ask every arm the same held-out problems in wording T.

    Args:
        target: theta_target, float32, holding bf16 values; likewise the next two.
        tuned: theta_GRPO.
        base: theta_SFT.
        tokenizer: the demo's tokenizer.
        seed: draws the problems and the random vector.
        console: shows each arm as it is measured.
    """
    vector = _difference(tuned, base)
    noise = _random_like(vector, seed)
    problems = {
        group: draw_distinct(random.Random(f"{seed} {group}"), families, "T", "held_out", count)
        for group, (families, count) in GROUPS.items()
    }
    arms: dict[str, Arm] = {}
    replies: dict[str, list[Reply]] = {}
    for name, alpha, delta, is_forced in (
        ("alpha -1", -1.0, vector, False),
        ("alpha 0", 0.0, vector, False),
        ("alpha 0.5", 0.5, vector, False),
        ("alpha 1", 1.0, vector, False),
        ("random vector", 1.0, noise, False),
        ("alpha 0, made to write steps", 0.0, vector, True),
    ):
        model = _fused(target, delta, alpha)
        groups = ("chain",) if is_forced else tuple(GROUPS)
        asked = {
            group: ask(model, tokenizer, problems[group], is_forced_to_work=is_forced)
            for group in groups
        }
        arms[name] = Arm(
            name=name,
            alpha=alpha,
            vector="v" if delta is vector else "random",
            is_forced_to_work=is_forced,
            accuracy={group: _accuracy(_grades(asked[group], problems[group])) for group in groups},
            works_share=_share([not r.text.startswith("Answer") for r in asked["chain"]]),
        )
        replies[name] = asked["chain"]
        console.print(name, {g: round(a.accuracy, 3) for g, a in arms[name].accuracy.items()})
    gain, interval = paired_gain(
        _grades(replies["alpha 0"], problems["chain"]),
        _grades(replies["alpha 1"], problems["chain"]),
    )
    return Evaluation(
        wording="T",
        split="held_out",
        decoding="greedy, ChatML, weights rounded to bf16, computed in float32",
        arms=list(arms.values()),
        chain_gain_points=gain,
        chain_gain_interval_95_points=interval,
        chain_replies_that_differ=_share(
            [a.text != b.text for a, b in zip(replies["alpha 0"], replies["alpha 1"], strict=True)]
        ),
        vector_norm_over_base_norm=round(_norm(vector) / _norm(_parameters(base)), 5),
        unchanged_weights_share=_unchanged_share(vector),
    )


def wilson_interval(correct: int, asked: int) -> tuple[float, float]:
    """Compute the 95 % score interval of a proportion (Wilson 1927).

    >>> [round(x, 3) for x in wilson_interval(50, 100)]
    [0.404, 0.596]
    """
    share = correct / asked
    scale = 1.0 + Z_95**2 / asked
    centre = (share + Z_95**2 / (2 * asked)) / scale
    half = Z_95 * math.sqrt(share * (1 - share) / asked + (Z_95 / (2 * asked)) ** 2) / scale
    return centre - half, centre + half


def paired_gain(before: list[bool], after: list[bool]) -> tuple[float, tuple[float, float]]:
    """Compute the mean change on the same problems, in points, and its 95 % normal interval."""
    changes = [float(b) - float(a) for a, b in zip(before, after, strict=True)]
    mean = sum(changes) / len(changes)
    variance = sum((change - mean) ** 2 for change in changes) / (len(changes) - 1)
    half = Z_95 * math.sqrt(variance / len(changes))
    return round(100 * mean, 2), (round(100 * (mean - half), 2), round(100 * (mean + half), 2))


def _grades(replies: list[Reply], problems: list[Problem]) -> list[bool]:
    return [score(reply, problem) for reply, problem in zip(replies, problems, strict=True)]


def _accuracy(grades: list[bool]) -> Accuracy:
    low, high = wilson_interval(sum(grades), len(grades))
    return Accuracy(sum(grades), len(grades), _share(grades), (round(low, 4), round(high, 4)))


def _share(flags: list[bool]) -> float:
    return round(sum(flags) / len(flags), 4)


def _parameters(model: Qwen2ForCausalLM) -> dict[str, Tensor]:
    """The model's parameters by name; a tied head is not listed beside its embedding."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _difference(tuned: Qwen2ForCausalLM, base: Qwen2ForCausalLM) -> dict[str, Tensor]:
    """Compute v = tuned - base in float32 and round it to bf16, held as float32."""
    subtrahend = _parameters(base)
    return {
        name: (minuend - subtrahend[name]).bfloat16().float()
        for name, minuend in _parameters(tuned).items()
    }


def _random_like(vector: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(v.shape, generator=generator) for name, v in vector.items()}
    return {name: n * (vector[name].norm() / n.norm()) for name, n in noise.items()}


@torch.no_grad()
def _fused(
    target: Qwen2ForCausalLM, vector: Mapping[str, Tensor], alpha: float
) -> Qwen2ForCausalLM:
    """Return a copy with theta + alpha * v: float32 arithmetic, one rounding to bf16."""
    model = copy.deepcopy(target)
    if alpha != 0.0:
        for name, parameter in model.named_parameters():
            parameter.copy_((parameter + alpha * vector[name]).bfloat16())
    return model


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors.values()))


def _unchanged_share(vector: Mapping[str, Tensor]) -> float:
    unchanged = sum(int((tensor == 0).sum()) for tensor in vector.values())
    return round(unchanged / sum(tensor.numel() for tensor in vector.values()), 4)
