"""What a sweep shows, as numbers and words: what `analyse` gives and every report is made of.

Data only. Rates and differences are shares (0.05 is five points); intervals are at 95 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import JsonValue

    from vllm_rvec.evaluation.records import Arm, ArmKind, Half
    from vllm_rvec.intervals import Estimate, Interval

__all__ = [
    "ArmSummary",
    "Comparison",
    "Confirmation",
    "Finding",
    "Flip",
    "Noise",
    "Power",
    "Scope",
    "SweepResults",
    "TaskSummary",
    "Verdict",
]


@dataclass(frozen=True, slots=True, order=True)
class Scope:
    """Which problems a number is about: all of them, a task's, or a family's."""

    task: str = ""
    """Empty: the problems of all tasks, each of the same weight."""
    family: str = ""
    """Empty: the whole task."""

    @property
    def label(self) -> str:
        """What people read."""
        return f"{self.task} / {self.family}" if self.family else self.task or "all tasks"


@dataclass(frozen=True, slots=True)
class TaskSummary:
    """What was asked."""

    name: str
    problems: int
    choose: int
    """Problems in the half that chooses the alpha."""
    confirm: int
    """Problems in the half that confirms it."""
    families: tuple[str, ...]
    """Those with a comparison of their own: empty where there are fewer than two."""
    scorer: str
    max_tokens: int
    thinking_prompt: str
    source: str
    digest: str


@dataclass(frozen=True, slots=True)
class ArmSummary:
    """One arm on the problems of one scope."""

    scope: Scope
    arm: str
    answers: int
    missing: int
    """Problems without an answer."""
    correct: int
    accuracy: Estimate | None
    """With Wilson's interval; None without answers."""
    format_failures: float | None
    """Share of answers in which nothing to compare was found."""
    cut_offs: float | None
    """Share of answers that ran into `max_tokens`."""
    mean_tokens: float | None
    """Of an answer."""
    median_tokens: float | None
    p95_tokens: float | None
    prompt_tokens: int
    """Of all answers: what the arm cost to read."""
    completion_tokens: int
    """Of all answers: what the arm cost to write."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One arm against another, on the problems that both answered."""

    scope: Scope
    half: Half | None
    """Which problems; None for all."""
    arm: str
    reference: str
    n: int
    """Problems that both answered."""
    both: int
    """Both right."""
    gained: int
    """The arm right, the reference wrong."""
    lost: int
    """The arm wrong, the reference right."""
    difference: float
    """Accuracy of the arm less that of the reference."""
    interval: Interval | None
    """Tango's; None without problems."""
    p_value: float
    """McNemar's, mid-p, two-sided."""
    adjusted_p: float | None
    """By Holm's method over the alphas that were tried with the same reference on the same
    problems; None where nothing was tried: controls, and the one test of a confirmation."""
    length_ratio: Estimate | None
    """How many times as long the arm's answers are: geometric mean over problems, of tokens."""

    @property
    def discordant(self) -> int:
        """Problems on which the two differ."""
        return self.gained + self.lost

    @property
    def is_gain(self) -> bool:
        """Whether the arm is better, as far as this one comparison shows."""
        return self.interval is not None and self.interval.low > 0 and self.p_value < 0.05

    @property
    def is_loss(self) -> bool:
        """Whether it is worse."""
        return self.interval is not None and self.interval.high < 0 and self.p_value < 0.05


@dataclass(frozen=True, slots=True)
class Power:
    """What a comparison of this size could show."""

    n: int
    discordance: float
    """Share of problems on which the arms differ, as seen."""
    detectable: float | None
    """The smallest true difference that is found four times out of five; None: not even the
    largest possible."""
    needed: int | None
    """Problems that would show the difference that was seen, if it is real, four times out of
    five; None where there is none."""


@dataclass(frozen=True, slots=True)
class Confirmation:
    """The alpha that one half of the problems chose, tested once on the other half."""

    scope: Scope
    kind: ArmKind
    """Of the arms to choose from: `vector`, against `base`; or `vector+prompt`, against
    `base+prompt`."""
    arm: str
    alpha: float
    candidates: int
    """Arms to choose from."""
    chosen_accuracy: float
    """On the half that chose: too high, for it is the highest of several."""
    against_base: Comparison
    """On the half that confirms; for `vector+prompt` this is against `base+prompt`."""
    against_prompt: Comparison | None
    """`vector` against `base+prompt`, on the half that confirms."""
    against_random: Comparison | None
    """Against the random vector of the nearest size, on the half that confirms."""
    power: Power
    adjusted_p: float | None
    """Of `against_base`, by Holm's method over tasks, where each task chose for itself."""


@dataclass(frozen=True, slots=True)
class Noise:
    """Alpha 0 once more, against base: what differs without any cause."""

    arm: str
    n: int
    texts: int
    """Answers that differ in any character."""
    grades: int
    """Answers that are graded otherwise."""
    rate: Estimate | None
    """Of grades that differ."""


@dataclass(frozen=True, slots=True)
class Flip:
    """A problem that base and an arm are graded on differently. Texts may be cut."""

    arm: str
    task: str
    problem: str
    is_gain: bool
    """The arm right and base wrong; else the reverse."""
    question: str
    expected: str
    base: str
    """What base answered."""
    answer: str
    """What the arm answered."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to know, with a stable name for machines."""

    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The recommendation."""

    code: Literal[
        "use_alpha",
        "prompt_does_as_much",
        "random_does_as_much",
        "no_gain",
        "loss",
        "cannot_tell",
    ]
    text: str
    arm: str | None
    """The arm that was chosen, whether it is recommended or not."""
    alpha: float | None
    """Its alpha."""
    with_prompt: Finding | None
    """The same for the arms with the prompt, where there are some."""
    warnings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class SweepResults:
    """All that follows from the answers of a sweep."""

    arms: tuple[Arm, ...]
    tasks: tuple[TaskSummary, ...]
    summaries: tuple[ArmSummary, ...]
    """Every arm in every scope: all tasks, each task, each family."""
    comparisons: tuple[Comparison, ...]
    """Every arm with base in every scope; those of the vector with the prompt also with
    base + prompt, and those of the vector with the random ones of the nearest size."""
    confirmations: tuple[Confirmation, ...]
    """Over all tasks, and for each task where there are several."""
    noise: tuple[Noise, ...]
    flips: tuple[Flip, ...]
    """A sample."""
    verdict: Verdict
    not_counted: int
    """Answers of arms, tasks or problems that aren't in this sweep, or given a second time."""
    facts: Mapping[str, JsonValue]
    """What it takes to repeat the sweep, as the caller says it."""

    def scopes(self) -> tuple[Scope, ...]:
        """Every scope, widest first, in the order of tasks."""
        return tuple(dict.fromkeys(summary.scope for summary in self.summaries))

    def of_kind(self, *kinds: ArmKind) -> tuple[Arm, ...]:
        """The arms of these kinds, by alpha."""
        found = [arm for arm in self.arms if arm.kind in kinds]
        return tuple(sorted(found, key=lambda arm: arm.alpha))

    def summary(self, scope: Scope, arm: str) -> ArmSummary:
        """The summary of an arm in a scope."""
        return next(one for one in self.summaries if one.scope == scope and one.arm == arm)

    def comparison(self, scope: Scope, arm: str, reference: str) -> Comparison | None:
        """A comparison on all problems of a scope, where it was made."""
        for one in self.comparisons:
            if (one.scope, one.arm, one.reference) == (scope, arm, reference):
                return one
        return None
