"""How a record of a public benchmark, or a line of ours, becomes a question and its answer.

The paper (arXiv:2509.01363) evaluates on GSM8K, HumanEval, SciQ and BIG-Bench Hard, and adds "Think
step by step."; that is `thinking_prompt`, and the runner's. What is asked here is the question, and
for chats a line that says where the answer goes: without it, arms would differ in how their answers
are found. Completions are prompted as lm-evaluation-harness does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from vllm_rvec.evaluation.halves import hash_of
from vllm_rvec.evaluation.scoring.choice import LETTERS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vllm_rvec.evaluation.tasks.files import Record
    from vllm_rvec.evaluation.tasks.spec import TaskSpec

__all__ = ["FORMATS", "Asked", "Format"]

BRANCHES: Final = re.compile(r"[-_.]?(?:test|train|validation|dev)\b.*")


@dataclass(frozen=True, slots=True)
class Asked:
    """A record, understood."""

    question: str
    """For a chat: the user's last message, without instruction and examples."""
    prompt: str
    """For a completion: to where the answer begins."""
    answer: JsonValue
    solution: str = ""
    """What an example shows as its answer."""
    id: str | None = None
    family: str = ""
    facts: Mapping[str, JsonValue] = field(default_factory=dict)
    messages: tuple[tuple[str, str], ...] = ()
    """Roles and contents, where the record has a whole chat."""
    is_completion: bool | None = None
    """Where the record itself says how it's asked."""


@dataclass(frozen=True, slots=True)
class Format:
    """What is known of a format."""

    record: type[BaseModel]
    """Checks a record."""
    understand: Callable[[Any, Record, TaskSpec], Asked]
    """Takes a checked record, the record as it came, and the spec."""
    scorer: str
    options: Mapping[str, JsonValue] = field(default_factory=dict)
    instruction: str = ""
    """For chats."""
    stop: tuple[str, ...] = ()
    """For completions."""
    max_tokens: int = 512


class _Record(BaseModel):
    """Fields that a benchmark has and we don't use are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, hide_input_in_errors=True)


class Turn(BaseModel):
    """A message."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    role: Literal["system", "user", "assistant"]
    content: str


class OwnLine(BaseModel):
    """A line of our own format."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    question: str | None = None
    prompt: str | None = None
    messages: list[Turn] | None = None
    answer: JsonValue
    id: str | int | None = None
    family: str = ""
    choices: list[str] | None = None
    facts: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_together(self) -> OwnLine:
        asked = (self.question, self.prompt, self.messages)
        if sum(one is not None for one in asked) != 1:
            msg = "one of `question`, `prompt` and `messages` is needed, and no two of them"
            raise ValueError(msg)
        if not any(asked) or not (self.question or self.prompt or "-").strip():
            msg = "there is nothing asked"
            raise ValueError(msg)
        if self.messages is not None and self.messages[-1].role != "user":
            msg = "the last of `messages` should be the user's"
            raise ValueError(msg)
        if self.answer is None:
            msg = "`answer` is null"
            raise ValueError(msg)
        return self


def _own(line: OwnLine, _: Record, spec: TaskSpec) -> Asked:
    text = line.messages[-1].content if line.messages else line.question or line.prompt or ""
    choices: dict[str, JsonValue] = {} if line.choices is None else {"choices": [*line.choices]}
    return Asked(
        question=text,
        prompt=text,
        answer=line.answer,
        solution=str(line.answer),
        id=None if line.id is None else str(line.id),
        family=line.family,
        facts={**line.facts, **choices},
        messages=tuple((turn.role, turn.content) for turn in line.messages or ()),
        is_completion=line.prompt is not None and spec.ask is None,
    )


class GradeSchoolRecord(_Record):
    """GSM8K (github.com/openai/grade-school-math, arXiv:2110.14168)."""

    question: str = Field(min_length=1)
    answer: str = Field(pattern=r"####")


CALCULATION: Final = re.compile(r"<<[^<>]{0,200}>>")
"""GSM8K's solutions hold annotations for a calculator."""


def _grade_school(record: GradeSchoolRecord, _: Record, __: TaskSpec) -> Asked:
    return Asked(
        question=record.question,
        prompt=f"Question: {record.question}\nAnswer:",
        answer=record.answer.rpartition("####")[2].strip(),
        solution=CALCULATION.sub("", record.answer),
    )


class HumanEvalRecord(_Record):
    """HumanEval (github.com/openai/human-eval, arXiv:2107.03374)."""

    task_id: str = Field(min_length=1)
    prompt: str = Field(min_length=1)
    entry_point: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    test: str = Field(min_length=1)
    canonical_solution: str = ""


def _human_eval(record: HumanEvalRecord, _: Record, __: TaskSpec) -> Asked:
    return Asked(
        question=f"Complete this Python function:\n\n```python\n{record.prompt.strip()}\n```",
        prompt=record.prompt,
        answer=f"{record.test}\ncheck({record.entry_point})\n",
        solution=record.canonical_solution,
        id=record.task_id,
        facts={"entry_point": record.entry_point, "prompt": record.prompt},
    )


class SciQRecord(_Record):
    """SciQ (allenai/sciq on the Hub, arXiv:1707.06209)."""

    question: str = Field(min_length=1)
    correct_answer: str = Field(min_length=1)
    distractor1: str
    distractor2: str
    distractor3: str
    support: str = ""


def _sciq(record: SciQRecord, source: Record, spec: TaskSpec) -> Asked:
    wrong = (record.distractor1, record.distractor2, record.distractor3)
    place = f"{source.number}\0{record.question}"
    # In the file the right one is always in the same field; each question is dealt by itself, so
    # that the order stays the same when others are added.
    choices = sorted(
        (record.correct_answer, *wrong), key=lambda c: hash_of(str(spec.seed), place, c)
    )
    listed = "\n".join(f"({letter}) {text}" for letter, text in zip(LETTERS, choices, strict=False))
    question = f"{record.question}\n{listed}"
    passage = f"{record.support.strip()}\n\n" if spec.support and record.support.strip() else ""
    letter = LETTERS[choices.index(record.correct_answer)]
    return Asked(
        question=passage + question,
        prompt=f"{passage}Question: {question}\nAnswer:",
        answer=letter,
        solution=f"Answer: ({letter})",
        facts={"choices": [*choices]},
    )


class BigBenchRecord(_Record):
    """BIG-Bench Hard (github.com/suzgunmirac/BIG-Bench-Hard, arXiv:2210.09261)."""

    input: str = Field(min_length=1)
    target: str = Field(min_length=1)


def _big_bench(record: BigBenchRecord, source: Record, spec: TaskSpec) -> Asked:
    family = _subtask(source, spec)
    return Asked(
        question=record.input,
        prompt=f"Q: {record.input}\nA:",
        answer=record.target,
        solution=f"The answer is {record.target}.",
        id=f"{family}/{source.number}",
        family=family,
    )


def _subtask(source: Record, spec: TaskSpec) -> str:
    """Name the subtask: the file's, or on the Hub the folder's in which the split lies."""
    stem = source.path.name.partition(".")[0]
    if BRANCHES.fullmatch(stem):
        return source.path.parent.name
    return spec.subset or BRANCHES.sub("", stem) or stem


FORMATS: Final[Mapping[str, Format]] = {
    "jsonl": Format(OwnLine, _own, "exact"),
    "gsm8k": Format(
        GradeSchoolRecord,
        _grade_school,
        "numeric",
        instruction='Write the final number behind "####" at the end.',
        stop=("Question:", "</s>", "<|im_end|>"),
        max_tokens=1024,
    ),
    "humaneval": Format(
        HumanEvalRecord,
        _human_eval,
        "python",
        instruction="Answer with the whole function, in one block of Python code.",
        stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
        max_tokens=1024,
    ),
    "sciq": Format(
        SciQRecord,
        _sciq,
        "choice",
        instruction='Write the right letter behind "Answer:" at the end.',
        stop=("\n\n", "Question:"),
    ),
    "bbh": Format(
        BigBenchRecord,
        _big_bench,
        "bbh",
        instruction='Write the answer behind "The answer is" at the end.',
        stop=("Q:", "</s>", "<|im_end|>"),
        max_tokens=1024,
    ),
}
"""By the name that a task's spec says."""
