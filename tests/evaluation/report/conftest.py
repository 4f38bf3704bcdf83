"""Sweeps to report on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.evaluation.simulation import (
    BASE,
    MINUS,
    PROMPT,
    PROMPTED,
    RANDOM,
    REPEAT,
    VECTORS,
    Truth,
    answers_of,
    sweep,
    task,
)
from vllm_rvec.evaluation.analysis import analyse
from vllm_rvec.evaluation.records import Problem, Task

if TYPE_CHECKING:
    from vllm_rvec.evaluation.results import SweepResults

HOSTILE = "<script>alert(1)</script>\"'&|`*_[x](javascript:1)\n# \x1b[31m\u202e\udc80"
"""What a name, a question or a model may hold."""


@pytest.fixture(scope="session")
def results() -> SweepResults:
    """Three tasks, one with families, all kinds of arms, much to be careful about."""
    truths = {
        BASE: Truth(),
        PROMPT: Truth(0.05, 0.2, tokens=90),
        REPEAT: Truth(0.0, 0.02),
        VECTORS[0]: Truth(0.05, 0.2),
        VECTORS[1]: Truth(0.2, 0.3, by_task={"b": -0.2}),
        VECTORS[3]: Truth(0.0, 0.3, tokens=150, cut_offs=0.2, format_failures=0.2),
        **{arm: Truth(0.2, 0.3, tokens=120) for arm in PROMPTED},
        MINUS: Truth(-0.2, 0.3),
        RANDOM: Truth(),
    }
    return sweep(5, [task("a", 200), task("b", 100), task("bbh", 120, 3)], truths)


@pytest.fixture(scope="session")
def hostile() -> SweepResults:
    """Everything that others write is an attempt to be more than text."""
    base, vector = (replace(one, name=one.name + HOSTILE) for one in (BASE, VECTORS[0]))
    problems = tuple(
        Problem(
            id=f"{index}{HOSTILE}", answer=HOSTILE, prompt=HOSTILE, family=f"{index % 2}{HOSTILE}"
        )
        for index in range(60)
    )
    tasks = [Task(HOSTILE, problems, scorer=HOSTILE, source=HOSTILE, digest=HOSTILE)]
    truths = {base: Truth(), vector: Truth(cut_offs=0.5, tokens=100)}
    given = answers_of(np.random.default_rng(1), tasks, truths)
    answers = [replace(one, text=one.text + HOSTILE) for one in given]
    return analyse(tasks, [base, vector], answers, {HOSTILE: HOSTILE, "list": [HOSTILE, None, 1.5]})
