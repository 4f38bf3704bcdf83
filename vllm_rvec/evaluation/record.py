"""`sweep.json`: everything that it takes to repeat a sweep, and to know whether one goes on.

Written before the first question, and again whenever the sweep goes on. Not here: the answers
(`answers`).
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from vllm_rvec.checkpoint.output import replace_durably
from vllm_rvec.errors import ConfigError
from vllm_rvec.evaluation.records import Arm, ArmKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from vllm_rvec.evaluation.records import Task

__all__ = ["RECORD_NAME", "TYPED", "ArmRecord", "Run", "SweepRecord", "TaskRecord", "read_record"]

RECORD_NAME: Final = "sweep.json"

HARMLESS_FLAGS: Final = frozenset(
    {
        "disable-log-stats",
        "gpu-memory-utilization",
        "kv-cache-memory-bytes",
        "max-model-len",
        "max-num-batched-tokens",
        "max-num-seqs",
    }
)
"""Flags of vLLM that decide how much fits, and not what is answered."""

TYPED: Final = "--"
"""Among the flags: the words that were typed behind it."""

INCIDENTAL: Final = frozenset({"source", "model", "alphas"})
"""What may be called otherwise and is the same: a task's place, the served name of an arm."""

How = Literal["dial", "live", "endpoint"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskRecord(_Part):
    """What was asked."""

    digest: str
    scorer: str
    max_tokens: int
    thinking_prompt: str
    stop: tuple[str, ...]
    scorer_options: dict[str, JsonValue]
    source: str

    @classmethod
    def of(cls, task: Task) -> TaskRecord:
        """Describe a task."""
        return cls(
            digest=task.digest,
            scorer=task.scorer,
            max_tokens=task.max_tokens,
            thinking_prompt=task.thinking_prompt,
            stop=task.stop,
            scorer_options=dict(task.scorer_options),
            source=task.source,
        )


class ArmRecord(_Part):
    """An arm, and how it was asked for last."""

    name: str
    kind: ArmKind
    alpha: float
    is_prompted: bool
    model: str
    alphas: float | dict[str, float] | None

    @classmethod
    def of(cls, arm: Arm) -> ArmRecord:
        """Describe an arm."""
        return cls.model_validate(asdict(arm))

    def arm(self) -> Arm:
        """The arm."""
        return Arm(**dict(self))


class Run(_Part):
    """One time that the command ran."""

    started: str
    """In UTC."""
    command: str
    """As it was typed."""
    versions: dict[str, str]
    endpoint: str | None
    """Where it asked; None for an engine of its own."""

    @classmethod
    def now(cls, **facts: object) -> Run:
        """Describe a run that begins."""
        started = datetime.now(UTC).isoformat(timespec="seconds")
        return cls.model_validate({"started": started, **facts})


class SweepRecord(_Part):
    """All of it."""

    format: Literal[1] = 1
    how: How
    """By a dial of its own; a fused engine that is brought to each alpha in turn; or elsewhere."""
    target: str
    target_digest: str | None
    """`identity.sampled_digest`; None for what isn't on this machine."""
    vector: str | None
    vector_digest: str | None
    """Of its manifest."""
    random_seed: int | None
    """Of the random vector; None where there is none."""
    seed: int
    temperature: float
    engine: dict[str, JsonValue]
    """vLLM's flags; under `--` those that were typed."""
    tasks: dict[str, TaskRecord]
    """What was asked in any run: its answers are there still, whatever the last run asked."""
    arms: tuple[ArmRecord, ...]
    """The same, the last run's first."""
    missing: dict[str, str]
    """Arms that could not be had, and why."""
    config: dict[str, JsonValue]
    """As it was written, by file or flags."""
    runs: tuple[Run, ...] = ()

    def clashes(self, kept: SweepRecord) -> list[str]:
        """Say what keeps this sweep from going on where another one stopped.

        More arms, more tasks and more problems do not, nor does what only decides how fast it goes.
        """
        return [
            *self._differing(kept),
            *_differing_parts("task", kept.tasks, self.tasks),
            *_differing_parts("arm", _by_name(kept.arms), _by_name(self.arms)),
        ]

    def _differing(self, kept: SweepRecord) -> Iterator[str]:
        for name in ("how", "target_digest", "vector_digest", "seed", "temperature"):
            old, new = getattr(kept, name), getattr(self, name)
            if old != new:
                yield f"{name.replace('_', ' ')}: {old} there, {new} now"
        if self.target_digest is None and self.target != kept.target:
            yield f"target: {kept.target} there, {self.target} now"
        if (
            None not in {self.random_seed, kept.random_seed}
            and self.random_seed != kept.random_seed
        ):
            yield f"random seed: {kept.random_seed} there, {self.random_seed} now"
        # By it an engine of its own has other weights, of the same target and vector.
        old, new = (one.config.get("vocabulary", "strict") for one in (kept, self))
        if old != new:
            yield f"vocabulary: {old} there, {new} now"
        old_flags, new_flags = _telling(kept.engine), _telling(self.engine)
        for flag in sorted(old_flags.keys() | new_flags.keys()):
            if old_flags.get(flag) != new_flags.get(flag):
                yield f"vLLM's --{flag}: {old_flags.get(flag)} there, {new_flags.get(flag)} now"

    def continuing(self, kept: SweepRecord) -> SweepRecord:
        """This record with the runs, and what else only the other one knows.

        Raises:
            ConfigError: They are different sweeps.
        """
        if problems := self.clashes(kept):
            raise ConfigError(
                "the folder holds the answers of another sweep",
                problems=problems,
                why="answers of one sweep compare only when all were asked in the same way",
                fix="choose another folder: --output; or go back to what was asked there",
            )
        now = _by_name(self.arms)
        return self.model_copy(
            update={
                "random_seed": kept.random_seed if self.random_seed is None else self.random_seed,
                "tasks": {**kept.tasks, **self.tasks},
                "arms": (*self.arms, *(arm for arm in kept.arms if arm.name not in now)),
                "runs": (*kept.runs, *self.runs),
            }
        )

    def write(self, folder: Path) -> None:
        """Write it, whole or not at all.

        Raises:
            ConfigError: The folder can't be written to.
        """
        path = folder / RECORD_NAME
        try:
            replace_durably(path, self.model_dump_json(indent=2).encode() + b"\n")
        except OSError as exc:
            raise ConfigError(
                f"{path} can't be written", why=exc.strerror or str(exc), path=path
            ) from exc


def read_record(folder: Path) -> SweepRecord | None:
    """Read what a folder holds; None where it holds no sweep.

    Raises:
        ConfigError: It is something else.
    """
    path = folder / RECORD_NAME
    try:
        return SweepRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as exc:
        why = str(exc.strerror) if isinstance(exc, OSError) else "this version does not read it"
        raise ConfigError(
            f"{path} is not a sweep's record",
            why=why,
            fix="choose another folder: --output",
            path=path,
        ) from exc


def _by_name(arms: Sequence[ArmRecord]) -> dict[str, ArmRecord]:
    return {arm.name: arm for arm in arms}


def _telling(flags: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    typed = flags.get(TYPED)
    plain = {_plain(name): value for name, value in flags.items() if name != TYPED}
    plain.update(_typed(typed) if isinstance(typed, list) else {})
    return {name: value for name, value in plain.items() if name not in HARMLESS_FLAGS}


def _typed(words: Sequence[JsonValue]) -> dict[str, JsonValue]:
    """Sort the words of a command line by flag."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in map(str, words):
        if word.startswith("-") and not word[1:2].isdigit():  # -1 is a value
            flag, equals, value = word.partition("=")
            name = _plain(flag)
            found.setdefault(name, []).extend([value] if equals else [])
        else:
            found.setdefault(name, []).append(word)
    return {name: " ".join(values) or True for name, values in found.items()}


def _plain(flag: str) -> str:
    return flag.lstrip("-").replace("_", "-")


def _differing_parts(
    word: str, kept: Mapping[str, _Part], new: Mapping[str, _Part]
) -> Iterator[str]:
    for name in kept.keys() & new.keys():
        old_facts, new_facts = kept[name].model_dump(), new[name].model_dump()
        changed = [key for key in old_facts if old_facts[key] != new_facts[key]]
        if changed := [key for key in changed if key not in INCIDENTAL]:
            yield f"{word} {name}: another {', '.join(changed)}".replace("_", " ")
