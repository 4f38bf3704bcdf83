"""Solved examples that are shown before a question."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vllm_rvec.errors import ConfigError
from vllm_rvec.evaluation.tasks.files import Fault, Record, read_records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from vllm_rvec.evaluation.tasks.formats import Asked
    from vllm_rvec.evaluation.tasks.spec import FewShot

__all__ = ["NO_EXAMPLES", "Examples", "read_examples"]

MAX_TEXT_BYTES: Final = 1 << 20
CANARY: Final = "\n-----\n"
"""BIG-Bench Hard's prompts begin with a line that keeps them out of training, and this."""


@dataclass(frozen=True, slots=True)
class Examples:
    """What is shown: solved problems, or texts by family."""

    solved: tuple[Asked, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    """An empty name is for all families."""

    def before_question(self, asked: Asked) -> str:
        """Put the text before the user's message."""
        return self._text(asked) + asked.question

    def before_prompt(self, asked: Asked) -> str:
        """Put text and examples before a completion's prompt."""
        shown = (f"{_joined(one.prompt, one.solution)}\n\n" for one in self.solved)
        return self._text(asked) + "".join(shown) + asked.prompt

    def turns(self) -> Iterator[tuple[str, str]]:
        """Show examples as what was said before, by role."""
        for one in self.solved:
            yield "user", one.question
            yield "assistant", one.solution

    def _text(self, asked: Asked) -> str:
        text = self.texts.get(asked.family, self.texts.get("", ""))
        return f"{text}\n\n" if text else ""


NO_EXAMPLES: Final = Examples()


def _joined(prompt: str, solution: str) -> str:
    return prompt + solution if prompt[-1:].isspace() else f"{prompt} {solution.strip()}"


def read_examples(shots: FewShot, understand: Callable[[Record], Asked | Fault]) -> Examples:
    """Read the examples that a task shows.

    Args:
        shots: Where they are.
        understand: Reads a record as the task's own are read.

    Raises:
        ConfigError: There are none, fewer than asked for, or they are wrong.
    """
    path = Path(shots.path)
    if path.is_dir():
        texts = {file.stem: _read(file) for file in sorted(path.glob("*.txt"))}
        if not texts:
            raise ConfigError(f"the folder {path} holds no examples: no `.txt`", path=path)
        return Examples(texts=texts)
    if path.suffix == ".txt":
        return Examples(texts={"": _read(path)})
    return Examples(solved=_solved(path, shots.count, understand))


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_TEXT_BYTES + 1).decode()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the examples {path} can't be read", why=str(exc), path=path) from exc
    if len(text) > MAX_TEXT_BYTES:
        raise ConfigError(f"the examples {path} are longer than any prompt", path=path)
    return text.partition(CANARY)[2].strip() if CANARY in text else text.strip()


def _solved(
    path: Path, count: int, understand: Callable[[Record], Asked | Fault]
) -> tuple[Asked, ...]:
    if not path.is_file():
        raise ConfigError(f"there is no file of examples {path}", path=path)
    found: list[Asked] = []
    for record in read_records(path):
        one = understand(record) if isinstance(record, Record) else record
        if isinstance(one, Fault):
            raise ConfigError(
                f"the examples {path} can't be used",
                problems=[f"{one.where}: {one.what}"],
                path=path,
            )
        found.append(one)
        if len(found) == count:
            return tuple(found)
    raise ConfigError(
        f"{count} examples are to be shown, and {path} has {len(found)}",
        fix="set `few_shot.count`",
        path=path,
    )
