"""Sweeps whose truth is known: what the arms really do is chosen, chance does the rest."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from vllm_rvec.evaluation.analysis import analyse
from vllm_rvec.evaluation.records import Answer, Arm, ArmKind, Grade, Message, Problem, Task

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm_rvec.evaluation.records import Half
    from vllm_rvec.evaluation.results import SweepResults

BASE_RATE = 0.5


def arm(kind: ArmKind, alpha: float = 0.0, name: str = "") -> Arm:
    """An arm, named as the runner names it."""
    names = {
        ArmKind.VECTOR: f"v@{alpha:g}",
        ArmKind.VECTOR_PROMPT: f"v@{alpha:g}+prompt",
        ArmKind.MINUS: "-v",
        ArmKind.RANDOM: f"random@{alpha:g}",
    }
    return Arm(
        name=name or names.get(kind, kind.value),
        kind=kind,
        alpha=alpha,
        model="m",
        is_prompted="prompt" in kind.value,
    )


BASE = arm(ArmKind.BASE)
PROMPT = arm(ArmKind.BASE_PROMPT)
REPEAT = arm(ArmKind.REPEAT)
RANDOM = arm(ArmKind.RANDOM, 1.0)
MINUS = arm(ArmKind.MINUS, -1.0)
VECTORS = tuple(arm(ArmKind.VECTOR, alpha) for alpha in (0.25, 0.5, 0.75, 1.0))
PROMPTED = tuple(arm(ArmKind.VECTOR_PROMPT, alpha) for alpha in (0.5, 1.0))


@cache
def task(name: str, problems: int, families: int = 0) -> Task:
    """A task of that many problems."""
    return Task(
        name=name,
        problems=tuple(
            Problem(
                id=str(index),
                answer=index,
                messages=(Message("user", f"What is {index}?"),),
                family=f"family {index % families}" if families else "",
            )
            for index in range(problems)
        ),
        scorer="numeric",
        digest="0" * 64,
    )


@dataclass(frozen=True)
class Truth:
    """What an arm really does, compared with base."""

    effect: float = 0.0
    """More of all problems right than base."""
    discordance: float = 0.2
    """Share of problems on which it differs from base."""
    tokens: int = 40
    """Of an answer, about."""
    cut_offs: float = 0.0
    format_failures: float = 0.0
    by_task: Mapping[str, float] = field(default_factory=dict)
    """Effects that differ."""


@cache
def answer(arm: str, task: str, problem: str, half: Half, *, is_correct: bool) -> Answer:
    """One answer; alike ones are made once, for simulations make a million."""
    text = f"The answer is {problem}." if is_correct else f"It is {problem}1, I think."
    return Answer(
        arm=arm,
        task=task,
        problem=problem,
        family="",
        half=half,
        text=text,
        finish_reason="stop",
        prompt_tokens=20,
        completion_tokens=40,
        seconds=0.5,
        grade=Grade(is_correct=is_correct, found=problem),
    )


def answers_of(
    rng: np.random.Generator, tasks: Sequence[Task], truths: Mapping[Arm, Truth]
) -> list[Answer]:
    """Let every arm answer; every second problem chooses, the others confirm."""
    found: list[Answer] = []
    for one in tasks:
        n = len(one.problems)
        base = rng.random(n) < BASE_RATE
        for arm_, truth in truths.items():
            right = _right(rng, base, truth, one.name) if arm_.kind is not ArmKind.BASE else base
            made = [
                answer(arm_.name, one.name, problem.id, half_of(index), is_correct=bool(correct))
                for index, (problem, correct) in enumerate(
                    zip(one.problems, right.tolist(), strict=True)
                )
            ]
            found += made if truth == _plain(truth) else _styled(rng, made, truth)
    return found


def half_of(index: int) -> Half:
    """Every second problem."""
    return "confirm" if index % 2 else "choose"


def sweep(seed: int, tasks: Sequence[Task], truths: Mapping[Arm, Truth]) -> SweepResults:
    """Simulate and analyse."""
    rng = np.random.default_rng(seed)
    return analyse(tasks, list(truths), answers_of(rng, tasks, truths), {"seed": seed})


def codes(results: SweepResults) -> set[str]:
    """Of the warnings."""
    return {warning.code for warning in results.verdict.warnings}


def _right(rng: np.random.Generator, base: np.ndarray, truth: Truth, task_name: str) -> np.ndarray:
    effect = truth.by_task.get(task_name, truth.effect)
    gain = (truth.discordance + effect) / 2 / (1 - BASE_RATE)
    loss = (truth.discordance - effect) / 2 / BASE_RATE
    assert 0 <= loss <= 1
    assert 0 <= gain <= 1
    flips = rng.random(base.size) < np.where(base, loss, gain)
    return base ^ flips


def _plain(truth: Truth) -> Truth:
    return Truth(effect=truth.effect, discordance=truth.discordance, by_task=truth.by_task)


def _styled(rng: np.random.Generator, made: list[Answer], truth: Truth) -> list[Answer]:
    return [
        replace(
            one,
            completion_tokens=int(rng.integers(truth.tokens // 2, truth.tokens * 3 // 2 + 1)),
            finish_reason="length" if rng.random() < truth.cut_offs else "stop",
            grade=replace(one.grade, found=None, is_correct=False)
            if rng.random() < truth.format_failures
            else one.grade,
        )
        for one in made
    ]
