"""One sweep as a whole: what is asked, what has been answered, and what it takes to repeat it.

Not here: who answers, and how an engine is started for it (the command).
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from importlib.metadata import packages_distributions, version
from typing import TYPE_CHECKING, Final

from vllm_rvec import __version__
from vllm_rvec.errors import ConfigError
from vllm_rvec.evaluation.answers import key_of, read_answers
from vllm_rvec.evaluation.asking import Question, questions_of
from vllm_rvec.evaluation.halves import half_of
from vllm_rvec.evaluation.record import (
    RECORD_NAME,
    TYPED,
    ArmRecord,
    How,
    Run,
    SweepRecord,
    TaskRecord,
    read_record,
)
from vllm_rvec.evaluation.records import ArmKind
from vllm_rvec.evaluation.tasks import chosen_problems, load_task

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from pydantic import JsonValue

    from vllm_rvec.evaluation.arms import Plan
    from vllm_rvec.evaluation.asking import HalfOf
    from vllm_rvec.evaluation.config import SweepConfig
    from vllm_rvec.evaluation.records import Answer, Arm, Half, Task

__all__ = [
    "Cost",
    "Subject",
    "Sweep",
    "answers_of",
    "cost_of",
    "facts_of",
    "load_tasks",
]

CHARACTERS_A_TOKEN: Final = 4
"""Of English with a large vocabulary, to say in advance about what a sweep will take."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is swept, and who answers."""

    how: How
    target: str
    target_digest: str | None
    vector: str | None
    vector_digest: str | None


@dataclass(frozen=True, slots=True)
class Cost:
    """About what asking will take."""

    requests: int
    prompt_tokens: int
    """By the number of characters."""
    completion_tokens: int
    """At most."""


def load_tasks(config: SweepConfig) -> tuple[Task, ...]:
    """Load what is asked, cut to the limit.

    Raises:
        ConfigError: Something is wrong with a task.
        FetchError: A dataset can't be fetched.
    """
    tasks = (load_task(spec, allow_code=config.allow_code) for spec in config.tasks)
    return tuple(_limited(task, config) for task in tasks)


def _limited(task: Task, config: SweepConfig) -> Task:
    chosen = chosen_problems(task.problems, config.limit, str(config.seed), task.name)
    return replace(task, problems=chosen)


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is asked in which arms, and what has been answered so far."""

    config: SweepConfig
    tasks: tuple[Task, ...]
    plan: Plan
    record: SweepRecord
    known: tuple[Answer, ...]
    """Answers of earlier runs to what is asked now."""

    @classmethod
    def begin(
        cls,
        config: SweepConfig,
        tasks: tuple[Task, ...],
        plan: Plan,
        subject: Subject,
        command: str = "",
    ) -> Sweep:
        """Start a sweep in its folder, or go on with the one that is there.

        Args:
            config: Its folder is locked by the caller.
            tasks: What is asked.
            plan: In which arms.
            subject: Of whom.
            command: What was typed, to be written down.

        Raises:
            ConfigError: The folder holds another sweep, or the base can't be had.
        """
        if all(arm.kind is not ArmKind.BASE for arm in plan.arms):
            why = next((one.why for one in plan.missing if one.name == "base"), "")
            raise ConfigError("there is nothing to compare with: no base", why=why)
        run = Run.now(command=command, versions=_versions(), endpoint=config.endpoint)
        record = _record(config, tasks, plan, subject, run)
        answers = read_answers(config.folder)
        # Where nothing was answered, say because the engine did not start, nothing has to match.
        if answers:
            record = record.continuing(_kept_record(config.folder))
        record.write(config.folder)
        known = _asked_now(answers, plan.arms, tasks)
        return cls(config, tasks, plan, record, known)

    @property
    def total(self) -> int:
        """How many answers there will be."""
        return len(self.plan.arms) * sum(len(task.problems) for task in self.tasks)

    def questions(self, arms: Sequence[Arm]) -> list[Question]:
        """What is still to be asked in these arms."""
        return questions_of(
            arms,
            self.tasks,
            seed=self.config.seed,
            half_of=_halves(self.config),
            known=map(key_of, self.known),
        )


def answers_of(
    config: SweepConfig, arms: Sequence[Arm], tasks: Sequence[Task]
) -> tuple[Answer, ...]:
    """Read the answers to what is asked now, each in its half."""
    half = _halves(config)
    return tuple(
        replace(one, half=half(one.task, one.problem, config.seed))
        for one in _asked_now(read_answers(config.folder), arms, tasks)
    )


def facts_of(record: SweepRecord) -> Mapping[str, JsonValue]:
    """What a report says about how to repeat it."""
    runs: list[JsonValue] = [run.model_dump(mode="json") for run in record.runs]
    plain = record.model_dump(mode="json", exclude={"runs", "arms", "tasks"})
    return {**plain, "runs": runs}


def _record(
    config: SweepConfig, tasks: Sequence[Task], plan: Plan, subject: Subject, run: Run
) -> SweepRecord:
    is_random = any(arm.kind is ArmKind.RANDOM for arm in plan.arms)
    words: dict[str, JsonValue] = {TYPED: list(config.engine_words)} if config.engine_words else {}
    return SweepRecord(
        how=subject.how,
        target=subject.target,
        target_digest=subject.target_digest,
        vector=subject.vector,
        vector_digest=subject.vector_digest,
        random_seed=config.random_seed if is_random else None,
        seed=config.seed,
        temperature=config.temperature,
        engine={**config.engine_flags, **words},
        tasks={task.name: TaskRecord.of(task) for task in tasks},
        arms=tuple(map(ArmRecord.of, plan.arms)),
        missing={one.name: one.why for one in plan.missing},
        config=config.model_dump(mode="json", by_alias=True, exclude_unset=True),
        runs=(run,),
    )


def _kept_record(folder: Path) -> SweepRecord:
    if (kept := read_record(folder)) is None:
        raise ConfigError(
            f"{folder} holds answers, and no {RECORD_NAME} that says to what",
            fix="bring it back, or choose another folder: --output",
            path=folder,
        )
    return kept


def _versions() -> dict[str, str]:
    found = {"vllm-rvec": __version__, "python": platform.python_version()}
    # By the module's name: what brings it is called otherwise on other machines.
    for distribution in packages_distributions().get("vllm", ())[:1]:
        found["vllm"] = version(distribution)
    return found


def _halves(config: SweepConfig) -> HalfOf:
    return half_of if config.confirm else _all_choose


def _all_choose(_task: str, _problem: str, _seed: int) -> Half:
    return "choose"


def _asked_now(
    answers: Iterable[Answer], arms: Sequence[Arm], tasks: Sequence[Task]
) -> tuple[Answer, ...]:
    names = {arm.name for arm in arms}
    problems = {(task.name, problem.id) for task in tasks for problem in task.problems}
    return tuple(a for a in answers if a.arm in names and (a.task, a.problem) in problems)


def cost_of(arms: Sequence[Arm], tasks: Sequence[Task]) -> Cost:
    """Say about what it takes to ask everything in every arm."""
    problems = sum(len(task.problems) for task in tasks)
    read = sum(
        len(problem.prompt or "") + sum(len(message.content) for message in problem.messages)
        for task in tasks
        for problem in task.problems
    )
    written = sum(len(task.problems) * task.max_tokens for task in tasks)
    count = len(arms)
    return Cost(count * problems, count * read // CHARACTERS_A_TOKEN, count * written)
