"""What a check of a vector against a target found: levels, each with its evidence.

Imports no torch. Not here: how anything is found; the other modules of this package do that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from vllm_rvec.errors import IncompatibleVectorError, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["Finding", "Level", "Report", "Verdict", "passed", "refused", "warned", "worst"]


class Verdict(StrEnum):
    """What a finding means for adding the vector, from best to worst."""

    PASS = "pass"  # noqa: S105 - no password
    WARN = "warn"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Finding:
    """One piece of evidence, one line, fit for a terminal or a log."""

    verdict: Verdict
    text: str


def passed(text: str) -> Finding:
    """Make a finding that speaks for the vector."""
    return Finding(Verdict.PASS, printable(text))


def warned(text: str) -> Finding:
    """Make a finding that a user should see and may accept."""
    return Finding(Verdict.WARN, printable(text))


def refused(text: str) -> Finding:
    """Make a finding for which the vector is not added."""
    return Finding(Verdict.REFUSE, printable(text))


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the worst of some verdicts; of none, pass.

    >>> worst([Verdict.WARN, Verdict.PASS])
    <Verdict.WARN: 'warn'>
    """
    return max(verdicts, key=list(Verdict).index, default=Verdict.PASS)


@dataclass(frozen=True, slots=True)
class Level:
    """One of the questions of a check, answered."""

    name: str
    """structure, tokenizer or lineage; before them quantization, for a quantized target."""
    summary: str
    """The answer in a few words, with its numbers."""
    findings: tuple[Finding, ...] = ()
    """The evidence."""
    numbers: Mapping[str, float | int | None] = field(default_factory=dict)
    """What was counted or measured, for machines."""
    why: str = ""
    """Why a refusal can't be forced, and"""
    fix: str = ""
    """what to do instead; empty where it can be."""

    @property
    def verdict(self) -> Verdict:
        """The worst of its findings."""
        return worst(finding.verdict for finding in self.findings)

    def texts(self, verdict: Verdict) -> tuple[str, ...]:
        """Return the evidence of one verdict."""
        return tuple(found.text for found in self.findings if found.verdict is verdict)


@dataclass(frozen=True, slots=True)
class Report:
    """A check of one vector against one target."""

    vector: str
    """The vector's folder or id."""
    target: str
    """The target's folder or id."""
    levels: tuple[Level, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst of its levels."""
        return worst(level.verdict for level in self.levels)

    def lines(self, verdict: Verdict) -> Iterator[str]:
        """Give the evidence of one verdict, each line with its level in front."""
        for level in self.levels:
            yield from (f"{level.name}: {text}" for text in level.texts(verdict))

    def as_json(self) -> dict[str, Any]:
        """Return the whole report as plain values."""
        return {
            "vector": self.vector,
            "target": self.target,
            "verdict": self.verdict.value,
            "levels": [
                {
                    "name": level.name,
                    "verdict": level.verdict.value,
                    "summary": level.summary,
                    "findings": [
                        {"verdict": found.verdict.value, "text": found.text}
                        for found in level.findings
                    ],
                    **level.numbers,
                }
                for level in self.levels
            ],
        }

    def raise_if_refused(self, force: bool = False) -> None:
        """Refuse the vector where the check does.

        Args:
            force: Go on in spite of it; the caller logs `lines(Verdict.REFUSE)`. A level that has
                a `fix` of its own refuses all the same.

        Raises:
            IncompatibleVectorError: A level refuses; with the evidence of all that do, or of the
                one that can't be forced.
        """
        bad = [level for level in self.levels if level.verdict is Verdict.REFUSE]
        if final := next((level for level in bad if level.fix), None):
            raise IncompatibleVectorError(
                f"the vector can't be added to {self.target}: {final.summary}",
                problems=final.texts(Verdict.REFUSE),
                why=final.why,
                fix=final.fix,
            )
        if force or not bad:
            return
        # Few before many: the message shows the first lines only, and no level should be lost.
        bad.sort(key=lambda level: len(level.texts(Verdict.REFUSE)))
        summaries = "; ".join(f"{level.name}: {level.summary}" for level in bad)
        raise IncompatibleVectorError(
            f"the vector does not belong to {self.target}: {summaries}",
            problems=[text for level in bad for text in level.texts(Verdict.REFUSE)],
            why="a sum is only defined for a target of the donors' own architecture, tokens and "
            "pretrained initialisation",
            fix=f"use a vector made for this target (all evidence: vllm-rvec check {self.vector} "
            f'--target {self.target}), or go on with --force ("force": true for the loader)',
        )
