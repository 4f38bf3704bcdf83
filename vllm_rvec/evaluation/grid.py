"""The answers of a sweep as a grid, arms by problems, so that all counting is of arrays.

Not here: what the counts mean (`statistics`, `comparing`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from vllm_rvec.errors import ConfigError
from vllm_rvec.evaluation.results import Scope

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from vllm_rvec.evaluation.records import Answer, Arm, ArmKind, Half, Problem, Task

    Flags = NDArray[np.bool_]
    Counts = NDArray[np.int64]

__all__ = ["Grid", "families_of", "grid_of"]


@dataclass(frozen=True, slots=True)
class Grid:
    """Arms by problems. What wasn't answered is False and 0."""

    arms: tuple[Arm, ...]
    problems: tuple[tuple[Task, Problem], ...]
    """Of all tasks, in their order."""
    scopes: Mapping[Scope, Flags]
    """Which problems belong to a scope, widest scope first."""
    halves: Mapping[Half, Flags]
    """Which problems belong to a half, as their answers say."""
    answered: Flags
    correct: Flags
    format_failures: Flags
    cut_offs: Flags
    tokens: Counts
    """Of each answer."""
    prompt_tokens: Counts
    answers: Mapping[tuple[int, int], Answer]
    """By arm and problem."""
    not_counted: int
    """Answers that belong nowhere, or were given a second time."""

    def index(self, arm: str) -> int:
        """The row of an arm."""
        return next(index for index, one in enumerate(self.arms) if one.name == arm)

    def of_kind(self, *kinds: ArmKind) -> tuple[Arm, ...]:
        """The arms of these kinds, as they were given."""
        return tuple(arm for arm in self.arms if arm.kind in kinds)

    def columns(self, scope: Scope, half: Half | None = None) -> Flags:
        """Which problems belong to a scope, and to a half of it."""
        return self.scopes[scope] if half is None else self.scopes[scope] & self.halves[half]

    def accuracy(self, arm: str, columns: Flags) -> float | None:
        """The share of right answers among those given; None where none was."""
        row = self.index(arm)
        answered = int(np.count_nonzero(self.answered[row] & columns))
        if not answered:
            return None
        return int(np.count_nonzero(self.correct[row] & columns)) / answered


def grid_of(tasks: Sequence[Task], arms: Sequence[Arm], answers: Sequence[Answer]) -> Grid:
    """Sort answers into their places; of two answers in one place the later one counts.

    Raises:
        ConfigError: Two arms, two tasks, or two problems of a task have one name.
    """
    _check_names("arms", [arm.name for arm in arms])
    _check_names("tasks", [task.name for task in tasks])
    for task in tasks:
        _check_names(f"problems of {task.name}", [problem.id for problem in task.problems])
    problems = tuple((task, problem) for task in tasks for problem in task.problems)
    placed = _placed(arms, problems, answers)
    shape = (len(arms), len(problems))
    places = tuple(np.array(list(placed), dtype=np.intp).reshape(-1, 2).T)

    def flags(values: list[bool]) -> Flags:
        grid = np.zeros(shape, dtype=np.bool_)
        grid[places] = values
        return grid

    def counts(values: list[int]) -> Counts:
        grid = np.zeros(shape, dtype=np.int64)
        grid[places] = values
        return grid

    given = list(placed.values())
    return Grid(
        arms=tuple(arms),
        problems=problems,
        scopes=_scopes(tasks, problems),
        halves=_halves(len(problems), placed),
        answered=flags([True] * len(given)),
        correct=flags([one.is_correct for one in given]),
        format_failures=flags([one.is_format_failure for one in given]),
        cut_offs=flags([one.is_cut_off for one in given]),
        tokens=counts([one.completion_tokens for one in given]),
        prompt_tokens=counts([one.prompt_tokens for one in given]),
        answers=placed,
        not_counted=len(answers) - len(given),
    )


def families_of(task: Task) -> tuple[str, ...]:
    """The families of a task in their order; none where there are fewer than two."""
    found = tuple(dict.fromkeys(problem.family for problem in task.problems if problem.family))
    return found if len(found) > 1 else ()


def _check_names(what: str, names: Sequence[str]) -> None:
    twice = [name for name, group in groupby(sorted(names)) if len(list(group)) > 1]
    if twice:
        raise ConfigError(
            f"Two {what} have the same name.",
            fix="Give each a name of its own: answers are told apart by it.",
            problems=twice,
        )


def _placed(
    arms: Sequence[Arm], problems: Sequence[tuple[Task, Problem]], answers: Sequence[Answer]
) -> dict[tuple[int, int], Answer]:
    rows = {arm.name: index for index, arm in enumerate(arms)}
    columns = {(task.name, problem.id): index for index, (task, problem) in enumerate(problems)}
    placed: dict[tuple[int, int], Answer] = {}
    for answer in answers:
        row, column = rows.get(answer.arm), columns.get((answer.task, answer.problem))
        if row is not None and column is not None:
            placed[row, column] = answer
    return placed


def _scopes(tasks: Sequence[Task], problems: Sequence[tuple[Task, Problem]]) -> dict[Scope, Flags]:
    names = np.array([task.name for task, _ in problems], dtype=object)
    families = np.array([problem.family for _, problem in problems], dtype=object)
    scopes: dict[Scope, Flags] = {Scope(): np.ones(len(problems), dtype=np.bool_)}
    for task in tasks:
        scopes[Scope(task.name)] = names == task.name
        for family in families_of(task):
            scopes[Scope(task.name, family)] = (names == task.name) & (families == family)
    return scopes


def _halves(problems: int, placed: Mapping[tuple[int, int], Answer]) -> dict[Half, Flags]:
    halves: dict[Half, Flags] = {
        "choose": np.zeros(problems, dtype=np.bool_),
        "confirm": np.zeros(problems, dtype=np.bool_),
    }
    for (_, column), answer in placed.items():
        halves[answer.half][column] = True
    # A problem whose answers disagree would be chosen by and confirmed by: it is in neither.
    both = halves["choose"] & halves["confirm"]
    return {half: flags & ~both for half, flags in halves.items()}
