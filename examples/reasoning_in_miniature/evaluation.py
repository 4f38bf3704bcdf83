"""Measure target + alpha * v on held-out problems, with the controls that make it mean something.

Not for the served model: that is `vllm-rvec sweep`. Here everything runs in transformers.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sampling import Reply, ask, score
from tasks import OTHER_FAMILIES, Family, Problem, draw_distinct
from vectors import difference, fused, norm, parameters, permuted, random_like

from vllm_rvec.intervals import Z, wilson

if TYPE_CHECKING:
    from collections.abc import Mapping
    from concurrent.futures import Executor

    from rich.console import Console
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import Qwen2ForCausalLM

__all__ = [
    "ARMS",
    "GROUPS",
    "Accuracy",
    "Arm",
    "ArmPlan",
    "Evaluation",
    "Gain",
    "Models",
    "draw_problems",
    "evaluate",
    "paired_gain",
]

GROUPS: dict[str, tuple[tuple[Family, ...], int]] = {
    "chain": (("chain",), 600),
    "count": (("count",), 300),
    "max": (("max",), 300),
    "other": (OTHER_FAMILIES, 300),
}
"""What is asked: families, and how many problems of them in all."""


@dataclass(frozen=True, slots=True)
class ArmPlan:
    """One way of asking: which vector, how much of it, and whether steps are forced."""

    name: str
    alpha: float
    vector: str = "v"
    """`v`; `random`: Gaussian, with the norm of v in every tensor; `permuted`: v, shuffled."""
    is_forced_to_work: bool = False
    """Whether the reply may not begin with `Answer`; asked of the chains alone."""


BASELINE = ArmPlan("alpha 0", 0.0)
FORCED_BASELINE = ArmPlan("alpha 0, made to write steps", 0.0, is_forced_to_work=True)

ARMS: tuple[ArmPlan, ...] = (
    BASELINE,
    ArmPlan("alpha -1", -1.0),
    ArmPlan("alpha -0.5", -0.5),
    ArmPlan("alpha 0.5", 0.5),
    ArmPlan("alpha 1", 1.0),
    ArmPlan("alpha 1.5", 1.5),
    ArmPlan("random vector", 1.0, "random"),
    ArmPlan("permuted vector", 1.0, "permuted"),
    FORCED_BASELINE,
    ArmPlan("alpha 1, made to write steps", 1.0, is_forced_to_work=True),
)
"""A baseline comes before what is compared with it."""


@dataclass(frozen=True, slots=True)
class Models:
    """The three checkpoints, float32, holding bf16 values, and their tokenizer."""

    target: Qwen2ForCausalLM
    tuned: Qwen2ForCausalLM
    """theta_GRPO."""
    base: Qwen2ForCausalLM
    """theta_SFT."""
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Correct answers out of those asked, with a 95 % Wilson interval."""

    correct: int
    asked: int
    accuracy: float
    interval_95: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Gain:
    """Accuracy less the baseline's on the same problems, in points, with a 95 % interval."""

    points: float
    interval_95_points: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Arm:
    """What an arm answered. Fields up to `is_forced_to_work` are its plan's."""

    name: str
    alpha: float
    vector: str
    is_forced_to_work: bool
    accuracy: dict[str, Accuracy]
    gain: dict[str, Gain]
    """Against alpha 0, asked in the same way."""
    works_share: float
    """Share of the chain replies that show steps."""
    differs_share: float
    """Share of the chain replies that are not the baseline's."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `results.json` holds of the evaluation."""

    wording: str
    split: str
    decoding: str
    arms: list[Arm]
    vector_norm_over_base_norm: float
    unchanged_weights_share: float
    """Share of bf16 weights that GRPO left bit-equal."""


def evaluate(models: Models, *, seed: int, pool: Executor, console: Console) -> Evaluation:
    """Ask every arm the same held-out problems in wording T.

    Args:
        models: target and donors.
        seed: draws the problems and the controls.
        pool: threads that take a batch of questions each.
        console: shows each arm as it is measured.
    """
    v = difference(models.tuned, models.base)
    vectors = {"v": v, "random": random_like(v, seed), "permuted": permuted(v, seed)}
    problems = draw_problems(seed)
    baselines: dict[bool, dict[str, list[Reply]]] = {}
    arms = []
    for plan in ARMS:
        model = fused(models.target, vectors[plan.vector], plan.alpha)
        replies = {
            group: ask(
                model,
                models.tokenizer,
                problems[group],
                pool=pool,
                is_forced_to_work=plan.is_forced_to_work,
            )
            for group in (("chain",) if plan.is_forced_to_work else tuple(GROUPS))
        }
        baseline = baselines.setdefault(plan.is_forced_to_work, replies)
        arms.append(_arm(plan, replies, baseline, problems))
        shown = {group: round(a.accuracy, 3) for group, a in arms[-1].accuracy.items()}
        console.print(plan.name, shown)
    return Evaluation(
        wording="T",
        split="held_out",
        decoding="greedy, ChatML, weights rounded to bf16, computed in float32",
        arms=arms,
        vector_norm_over_base_norm=round(norm(v) / norm(parameters(models.base)), 5),
        unchanged_weights_share=_unchanged_share(v),
    )


def draw_problems(seed: int) -> dict[str, list[Problem]]:
    """Draw what is asked, by group: held out, in wording T, pairwise different."""
    return {
        group: draw_distinct(random.Random(f"{seed} {group}"), families, "T", "held_out", count)
        for group, (families, count) in GROUPS.items()
    }


def paired_gain(before: list[bool], after: list[bool]) -> Gain:
    """Compute the mean change on the same problems, in points, and its 95 % normal interval.

    >>> paired_gain([False] * 8 + [True] * 2, [True] * 8 + [True] * 2).points
    80.0
    """
    changes = [float(b) - float(a) for a, b in zip(before, after, strict=True)]
    mean = sum(changes) / len(changes)
    variance = sum((change - mean) ** 2 for change in changes) / (len(changes) - 1)
    half = Z * math.sqrt(variance / len(changes))
    low, high = round(100 * (mean - half), 2), round(100 * (mean + half), 2)
    return Gain(round(100 * mean, 2), (low, high))


def _arm(
    plan: ArmPlan,
    replies: Mapping[str, list[Reply]],
    baseline: Mapping[str, list[Reply]],
    problems: Mapping[str, list[Problem]],
) -> Arm:
    grades = {group: _grades(found, problems[group]) for group, found in replies.items()}
    before = {group: _grades(baseline[group], problems[group]) for group in replies}
    pairs = zip(replies["chain"], baseline["chain"], strict=True)
    return Arm(
        name=plan.name,
        alpha=plan.alpha,
        vector=plan.vector,
        is_forced_to_work=plan.is_forced_to_work,
        accuracy={group: _accuracy(found) for group, found in grades.items()},
        gain={group: paired_gain(before[group], found) for group, found in grades.items()},
        works_share=_share([not reply.text.startswith("Answer") for reply in replies["chain"]]),
        differs_share=_share([reply.text != other.text for reply, other in pairs]),
    )


def _grades(replies: list[Reply], problems: list[Problem]) -> list[bool]:
    return [score(reply, problem) for reply, problem in zip(replies, problems, strict=True)]


def _accuracy(grades: list[bool]) -> Accuracy:
    interval = wilson(sum(grades), len(grades))
    assert interval is not None
    low, high = round(interval.low, 4), round(interval.high, 4)
    return Accuracy(sum(grades), len(grades), _share(grades), (low, high))


def _share(flags: list[bool]) -> float:
    return round(sum(flags) / len(flags), 4)


def _unchanged_share(vector: Mapping[str, Tensor]) -> float:
    unchanged = sum(int((tensor == 0).sum()) for tensor in vector.values())
    return round(unchanged / sum(tensor.numel() for tensor in vector.values()), 4)
