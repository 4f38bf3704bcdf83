"""Answers kept as they come, one JSON line each, in a folder that one sweep has at a time.

`answers.jsonl` only grows. A line that a crash cut off is dropped when the sweep goes on; a damaged
one anywhere else is an error, for nobody knows what it was. Not here: what else the folder holds
(`record`).
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import filelock
from pydantic import TypeAdapter, ValidationError

from vllm_rvec.errors import ConfigError
from vllm_rvec.evaluation.records import Answer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import FileIO
    from pathlib import Path

    Key = tuple[str, str, str]

__all__ = ["ANSWERS_NAME", "AnswerFile", "key_of", "locked_folder", "read_answers"]

ANSWERS_NAME: Final = "answers.jsonl"
LOCK_NAME: Final = ".lock"

SYNC_SECONDS: Final = 2.0
"""How much of a sweep a power cut may cost."""

_ANSWER: Final = TypeAdapter(Answer)


def key_of(answer: Answer) -> Key:
    """Arm, task and problem: what is asked once."""
    return answer.arm, answer.task, answer.problem


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keep a folder to oneself while the block runs; made if it is not there.

    Raises:
        ConfigError: Another sweep has it, or it can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / LOCK_NAME, blocking=False)
        lock.acquire()
    except filelock.Timeout as exc:
        raise ConfigError(
            f"another sweep is writing to {folder}",
            fix="wait for its end, or choose another folder: --output",
            path=folder,
        ) from exc
    except OSError as exc:
        raise ConfigError(
            f"the folder {folder} can't be used", why=exc.strerror or str(exc), path=folder
        ) from exc
    try:
        yield
    finally:
        lock.release()


def read_answers(folder: Path) -> list[Answer]:
    """Read what has been answered; nothing where there is no file. A cut-off last line is left out.

    Raises:
        ConfigError: A line is damaged.
    """
    answers: dict[Key, Answer] = {}
    for number, line in enumerate(_whole_lines(folder / ANSWERS_NAME), start=1):
        try:
            answer = _ANSWER.validate_json(line)
        except ValidationError as exc:
            raise ConfigError(
                f"line {number} of {folder / ANSWERS_NAME} is no answer",
                why="the file was edited or damaged",
                fix="remove that line, and the sweep will ask again; or choose another folder",
                path=folder / ANSWERS_NAME,
            ) from exc
        answers.setdefault(key_of(answer), answer)
    return list(answers.values())


def _whole_lines(path: Path) -> list[bytes]:
    data = path.read_bytes() if path.exists() else b""
    return data.split(b"\n")[:-1]  # what stands behind the last line's end is a piece of one


@dataclass(slots=True)
class AnswerFile:
    """The open file; use it as `with AnswerFile.open(folder) as file`."""

    file: FileIO
    synced_at: float

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[AnswerFile]:
        """Go on behind the last whole line.

        Args:
            folder: Locked by the caller.
        """
        path = folder / ANSWERS_NAME
        whole = sum(len(line) + 1 for line in _whole_lines(path))
        with path.open("ab", buffering=0) as file:
            file.truncate(whole)
            kept = cls(file, time.monotonic())
            try:
                yield kept
            finally:
                os.fsync(file.fileno())

    def keep(self, answer: Answer) -> None:
        """Write an answer down: a crash of this process loses none, one of the machine 2 s."""
        line = _ANSWER.dump_json(answer) + b"\n"
        if self.file.write(line) != len(line):
            msg = f"no room for an answer on the disk of {self.file.name!r}"
            raise OSError(msg)
        if time.monotonic() - self.synced_at > SYNC_SECONDS:
            os.fsync(self.file.fileno())
            self.synced_at = time.monotonic()
