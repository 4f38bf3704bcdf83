"""From a spec to a task: files found, records read and checked, questions put, some chosen."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, TypedDict

import blake3
from pydantic import ValidationError

from vllm_rvec.errors import ConfigError
from vllm_rvec.evaluation.halves import hash_of
from vllm_rvec.evaluation.records import Message, Problem, Task
from vllm_rvec.evaluation.scoring import checked_options, scorer_named
from vllm_rvec.evaluation.tasks.examples import NO_EXAMPLES, Examples, read_examples
from vllm_rvec.evaluation.tasks.files import Fault, Record, read_records
from vllm_rvec.evaluation.tasks.formats import FORMATS, Asked
from vllm_rvec.evaluation.tasks.places import files_of
from vllm_rvec.vector.settings_file import problems_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from pydantic import JsonValue

    from vllm_rvec.evaluation.tasks.spec import TaskSpec

__all__ = ["check_task", "chosen_problems", "load_task"]


class _Question(TypedDict, total=False):
    """The two ways in which a problem is asked."""

    prompt: str
    messages: tuple[Message, ...]


def load_task(spec: TaskSpec, *, allow_code: bool = False) -> Task:
    """Load a task, all of it checked.

    Args:
        spec: What people wrote.
        allow_code: Run what the model writes, as if the spec said so.

    Raises:
        ConfigError: The spec or a file is wrong; all problems of a file at once.
        FetchError: The network or the Hub fails.
    """
    return _Loading(spec, allow_code=allow_code or spec.allow_code).task()


def check_task(spec: TaskSpec, *, allow_code: bool = False) -> None:
    """Check all that can be checked without a task's files: scorer, options, permission.

    Args:
        spec: What people wrote.
        allow_code: As for `load_task`.

    Raises:
        ConfigError: The spec is wrong.
    """
    _Loading(spec, allow_code=allow_code or spec.allow_code)


def chosen_problems(
    problems: tuple[Problem, ...], limit: int | None, *deal: str
) -> tuple[Problem, ...]:
    """Keep as many as the limit says, in their order: a larger limit only adds some.

    Args:
        problems: Of one task.
        limit: None keeps all.
        deal: Seed and more: other words choose others.
    """
    if limit is None or limit >= len(problems):
        return problems
    order = sorted(problems, key=lambda one: hash_of("limit", *deal, one.id))
    kept = {problem.id for problem in order[:limit]}
    return tuple(problem for problem in problems if problem.id in kept)


class _Loading:
    """One task's way from a spec."""

    def __init__(self, spec: TaskSpec, *, allow_code: bool) -> None:
        self._spec = spec
        self._format = FORMATS[spec.format]
        self._name = spec.scorer or self._format.scorer
        self._scorer = scorer_named(self._name)
        self._written = self._options(allow_code=allow_code)
        self._options_checked = checked_options(self._name, self._written)

    def task(self) -> Task:
        spec, found = self._spec, files_of(self._spec)
        examples = self._examples()
        problems = self._checked(found.paths, examples)
        problems = chosen_problems(problems, spec.limit, str(spec.seed))
        is_completion = any(problem.prompt is not None for problem in problems)
        stop = self._format.stop if is_completion else ()
        task = Task(
            name=spec.called,
            problems=problems,
            scorer=self._name,
            scorer_options=self._written,
            max_tokens=spec.max_tokens or self._format.max_tokens,
            stop=stop if spec.stop is None else spec.stop,
            thinking_prompt=spec.thinking_prompt,
            source=found.source,
        )
        return replace(task, digest=_digest(task))

    def _options(self, *, allow_code: bool) -> Mapping[str, JsonValue]:
        """What the scorer is told; code is allowed here and nowhere else.

        Raises:
            ConfigError: It would run code that nobody has allowed.
        """
        default = self._format.options if self._name == self._format.scorer else {}
        options = {**default, **self._spec.options}
        if not self._scorer.runs_code:
            return options
        if "allow_code" in options:
            raise ConfigError(
                f"the task {self._spec.called} allows code among its scorer's options",
                fix="write `allow_code: true` beside `scorer`, not under `options`",
            )
        if not allow_code:
            raise ConfigError(
                f"the task {self._spec.called} runs code that the model writes",
                why=f"its scorer `{self._name}` executes every answer on this machine",
                fix="allow it with `allow_code: true` or --allow-code, best in a container without"
                " secrets; or leave the task out",
            )
        return {**options, "allow_code": True}

    def _examples(self) -> Examples:
        if self._spec.few_shot is None:
            return NO_EXAMPLES
        return read_examples(self._spec.few_shot, self._understood)

    def _understood(self, record: Record) -> Asked | Fault:
        try:
            checked = self._format.record.model_validate(record.values)
        except ValidationError as exc:
            what = "; ".join(problems_of(exc, self._format.record))
            return Fault(record.path, record.where, what)
        return self._format.understand(checked, record, self._spec)

    def _checked(self, paths: Sequence[Path], examples: Examples) -> tuple[Problem, ...]:
        """Read all problems; or say all that is wrong."""
        problems: list[Problem] = []
        faults: list[Fault] = []
        first: dict[str, Record] = {}
        for record in (one for path in paths for one in read_records(path)):
            problem = self._problem(record, examples, first, is_one=len(paths) == 1)
            if isinstance(problem, Fault):
                faults.append(problem)
            else:
                problems.append(problem)
        if faults:
            raise _unusable(paths, faults)
        asked = self._without_examples(problems, examples)
        if not asked:
            raise ConfigError(
                f"the task {self._spec.called} asks nothing",
                why="its file is empty" if not problems else "all its problems are examples",
                path=paths[0],
            )
        return asked

    def _without_examples(
        self, problems: Sequence[Problem], examples: Examples
    ) -> tuple[Problem, ...]:
        """Leave out what an example asks, word for word, and answers alike."""
        puts = [(one.answer, self._put(one, examples)) for one in examples.solved]
        shown = [(answer, put.get("prompt"), put.get("messages", ())) for answer, put in puts]
        return tuple(one for one in problems if (one.answer, one.prompt, one.messages) not in shown)

    def _problem(
        self,
        record: Record | Fault,
        examples: Examples,
        first: dict[str, Record],
        *,
        is_one: bool,
    ) -> Problem | Fault:
        """Make a problem of a record; `first` has the records seen before, by their ids."""
        if isinstance(record, Fault):
            return record
        asked = self._understood(record)
        if isinstance(asked, Fault):
            return asked
        problem = Problem(
            id=asked.id or (f"{record.number}" if is_one else f"{record.stem}/{record.number}"),
            answer=asked.answer,
            family=asked.family,
            facts=asked.facts,
            **self._put(asked, examples),
        )
        if (before := first.setdefault(problem.id, record)) is not record:
            return _twice(problem.id, before, record)
        fault = self._scorer.fault(problem, self._options_checked)
        return problem if fault is None else Fault(record.path, record.where, fault)

    def _put(self, asked: Asked, examples: Examples) -> _Question:
        is_completion = asked.is_completion
        if is_completion is None or self._spec.ask is not None:
            is_completion = self._spec.ask == "completion" and not asked.messages
        if is_completion:
            return {"prompt": examples.before_prompt(asked)}
        return {"messages": self._messages(asked, examples)}

    def _messages(self, asked: Asked, examples: Examples) -> tuple[Message, ...]:
        """Put a chat together: system, examples, then what is asked."""
        given = asked.messages or (("user", asked.question),)
        leading = [Message(*turn) for turn in given if turn[0] == "system"]
        if not leading and self._spec.system is not None:
            leading = [Message("system", self._spec.system)]
        turns = [Message(*turn) for turn in given if turn[0] != "system"]
        last = Message("user", self._instructed(examples.before_question(asked)))
        shown = [
            Message(role, self._instructed(text) if role == "user" else text)
            for role, text in examples.turns()
        ]
        return (*leading, *shown, *turns[:-1], last)

    def _instructed(self, question: str) -> str:
        instruction = self._spec.instruction
        if instruction is None:
            # The format's own goes with the format's own scorer.
            is_own = self._name == self._format.scorer
            instruction = self._format.instruction if is_own else ""
        return f"{question}\n\n{instruction}" if instruction else question


def _twice(id_: str, before: Record, record: Record) -> Fault:
    where = before.where if before.path == record.path else f"{before.path.name} {before.where}"
    return Fault(record.path, record.where, f"the id {id_} is that of {where} already")


def _unusable(paths: Sequence[Path], faults: Sequence[Fault]) -> ConfigError:
    is_one = len(paths) == 1
    return ConfigError(
        f"the task's file {paths[0]} can't be used" if is_one else "the task's files can't be used",
        problems=[
            f"{fault.where}: {fault.what}"
            if is_one
            else f"{fault.path.name}, {fault.where}: {fault.what}"
            for fault in faults
        ],
        fix="mend these; `format` says what is expected of a line",
        path=paths[0],
    )


def _digest(task: Task) -> str:
    """Digest what is asked and how it's graded: a resumed sweep must ask and grade the same."""
    hasher = blake3.blake3()
    asked = [asdict(problem) for problem in task.problems]
    how = [task.scorer, dict(task.scorer_options), task.max_tokens, task.stop]
    for one in ([*how, task.thinking_prompt], *asked):
        line = json.dumps(one, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        hasher.update(line.encode() + b"\n")
    return hasher.hexdigest()
