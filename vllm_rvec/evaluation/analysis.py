"""From the answers of a sweep to what they show: composition only.

Counting is `grid`'s and `comparing`'s, the held-out half `confirming`'s, formulas `statistics`',
words `verdict`'s and `cautions`', and what people see `report`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vllm_rvec.evaluation.cautions import cautions_of
from vllm_rvec.evaluation.comparing import compare_all, flips_of, noise_of, summarise
from vllm_rvec.evaluation.confirming import confirm_all
from vllm_rvec.evaluation.grid import families_of, grid_of
from vllm_rvec.evaluation.results import Scope, SweepResults, TaskSummary
from vllm_rvec.evaluation.verdict import verdict_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic import JsonValue

    from vllm_rvec.evaluation.grid import Grid
    from vllm_rvec.evaluation.records import Answer, Arm, Task

__all__ = ["analyse"]


def analyse(
    tasks: Sequence[Task],
    arms: Sequence[Arm],
    answers: Sequence[Answer],
    facts: Mapping[str, JsonValue],
) -> SweepResults:
    """Find out what a sweep shows.

    Args:
        tasks: What was asked.
        arms: In which ways; one of them of the kind `base`.
        answers: In any order; some may be missing, as in a sweep that was interrupted. Of two
            answers to one problem in one arm the later one counts.
        facts: What it takes to repeat the sweep (seeds, configuration, versions, digests, the
            command), to be printed as it is.

    Raises:
        ConfigError: Two arms, two tasks, or two problems of a task have one name.
    """
    grid = grid_of(tasks, arms, answers)
    comparisons, confirmations, noise = compare_all(grid), confirm_all(grid), noise_of(grid)
    warnings = cautions_of(grid, comparisons, confirmations, noise)
    return SweepResults(
        arms=tuple(arms),
        tasks=tuple(_task(grid, task) for task in tasks),
        summaries=tuple(summarise(grid, scope, arm.name) for scope in grid.scopes for arm in arms),
        comparisons=comparisons,
        confirmations=confirmations,
        noise=noise,
        flips=flips_of(grid),
        verdict=verdict_of(grid, comparisons, confirmations, warnings),
        not_counted=grid.not_counted,
        facts=dict(facts),
    )


def _task(grid: Grid, task: Task) -> TaskSummary:
    scope = Scope(task.name)
    return TaskSummary(
        name=task.name,
        problems=len(task.problems),
        choose=int(np.count_nonzero(grid.columns(scope, "choose"))),
        confirm=int(np.count_nonzero(grid.columns(scope, "confirm"))),
        families=families_of(task),
        scorer=task.scorer,
        max_tokens=task.max_tokens,
        thinking_prompt=task.thinking_prompt,
        source=task.source,
        digest=task.digest,
    )
