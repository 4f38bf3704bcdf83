"""What a sweep asks and what comes back: problems, arms, answers. Data only.

Not here: where problems come from (`tasks`), how answers are graded (`scoring`), how they are
asked for (`asking`) and kept (`answers`), and what follows from them (`statistics`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import JsonValue

__all__ = [
    "Answer",
    "Arm",
    "ArmKind",
    "Grade",
    "Half",
    "Message",
    "Problem",
    "Task",
]

Half = Literal["choose", "confirm"]
"""Problems of the first half choose the alpha; those of the second confirm it."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One question, and what its scorer compares an answer with."""

    id: str
    """Unique in its task; a file without ids has line numbers."""
    answer: JsonValue
    """What the scorer of the task needs: a text, a number, a letter, unit tests."""
    messages: tuple[Message, ...] = ()
    """Asked over `/v1/chat/completions`; empty where there is a `prompt`."""
    prompt: str | None = None
    """Asked over `/v1/completions`, as it is: for base models and for code that is completed."""
    family: str = ""
    """A group within the task, such as one of BIG-Bench Hard's subtasks; shown apart."""
    facts: Mapping[str, JsonValue] = field(default_factory=dict)
    """More that a scorer needs, such as HumanEval's `entry_point`."""


@dataclass(frozen=True, slots=True)
class Task:
    """Problems that are asked and graded in one way."""

    name: str
    problems: tuple[Problem, ...]
    scorer: str
    """Its name in `scoring.SCORERS`."""
    scorer_options: Mapping[str, JsonValue] = field(default_factory=dict)
    max_tokens: int = 512
    """Of an answer; one that ends there counts as cut off."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer."""
    thinking_prompt: str = "Think step by step."
    """What the arms with a prompt add behind the last user's message, after a line end."""
    source: str = ""
    """Where it came from, for the report: a path or Hub id, with the revision."""
    digest: str = ""
    """BLAKE3 of the problems as they are asked, so that a resumed sweep asks the same."""


class ArmKind(StrEnum):
    """What an arm is for."""

    BASE = "base"
    """The target as it is: alpha 0."""
    BASE_PROMPT = "base+prompt"
    """The target, asked to think step by step: what the vector must beat to be worth anything."""
    VECTOR = "vector"
    """The target with alpha * v."""
    VECTOR_PROMPT = "vector+prompt"
    """The same, asked to think step by step."""
    MINUS = "minus"
    """The target less v: what is lost when the ability is taken away."""
    RANDOM = "random"
    """A random vector of v's norm in every tensor: what any change of this size does."""
    REPEAT = "repeat"
    """Alpha 0 once more: what differs here is noise."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way in which every problem is asked."""

    name: str
    """Unique in the sweep: `base`, `base+prompt`, `v@0.5`, `v@0.5+prompt`, `-v`, `random@1`."""
    kind: ArmKind
    alpha: float
    """Of the vector; 0 for the target alone."""
    model: str
    """The served name that is asked for."""
    alphas: float | Mapping[str, float] | None = None
    """Sent as `alpha` in the request; None where the served name says it."""
    is_prompted: bool = False
    """Whether the task's thinking prompt is added."""


@dataclass(frozen=True, slots=True)
class Grade:
    """What a scorer finds."""

    is_correct: bool
    found: str | None
    """What was taken from the answer to be compared; None where nothing was found in it, which
    counts as a failure of format."""
    note: str = ""
    """Why, where it isn't plain: `timed out`, `killed`, the exception of a unit test."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One problem, asked in one arm, answered and graded. A line of the file of answers."""

    arm: str
    task: str
    problem: str
    """Its id."""
    family: str
    half: Half
    text: str
    """What the model said, its reasoning left out where the server tells it apart."""
    finish_reason: str
    """`stop`, `length`, or what else the server says."""
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    """From the request to the answer's end."""
    grade: Grade
    reasoning: str = ""
    """What a reasoning parser told apart."""
    tries: int = 1

    @property
    def is_correct(self) -> bool:
        """Whether it is."""
        return self.grade.is_correct

    @property
    def is_format_failure(self) -> bool:
        """Whether nothing to compare was found in it."""
        return self.grade.found is None

    @property
    def is_cut_off(self) -> bool:
        """Whether it ran into `max_tokens`: over-thinking, or collapse into repetition."""
        return self.finish_reason == "length"
