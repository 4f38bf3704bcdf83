"""The one exception hierarchy. Imports nothing of ours, and no third-party package.

    RvecError
    ├── ConfigError (ValueError)                what the user wrote is wrong
    ├── CheckpointError (ValueError)            a target or donor checkpoint can't be used
    │   └── CheckpointNotFoundError (FileNotFoundError)
    ├── VectorFormatError (ValueError)          not a vector that this version reads
    │   └── VectorNotFoundError (FileNotFoundError)
    ├── VectorCorruptError (ValueError)         a vector whose bytes or values are damaged
    ├── IncompatibleVectorError (ValueError)    a vector that does not belong to this target
    ├── FetchError (ConnectionError)            what is elsewhere can't be brought here now
    ├── EngineStartupError (RuntimeError)       an engine ended, or hung, before it was ready
    ├── AlphaChangeError (RuntimeError)         a live change of alpha did not come about
    │   ├── AlphaChangeRefusedError             nothing was touched: the old alpha is served
    │   └── AlphaChangeFailedError              the weights may be a mixture: not to be served
    └── UpstreamError (ConnectionError)         an engine can't be reached, or broke off

Each also inherits the builtin that a caller would expect.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = [
    "ERROR_MARKER",
    "AlphaChangeError",
    "AlphaChangeFailedError",
    "AlphaChangeRefusedError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ConfigError",
    "EngineStartupError",
    "FetchError",
    "IncompatibleVectorError",
    "RvecError",
    "UpstreamError",
    "VectorCorruptError",
    "VectorFormatError",
    "VectorNotFoundError",
    "printable",
]

ERROR_MARKER = "rvec error: "
"""What the loader's log line begins with when a load fails: `serve` finds the reason by it."""

SHOWN_PROBLEMS = 8
"""How many of a long list of problems a message shows; `problems` holds them all."""


class RvecError(Exception):
    """Root of every error that this package raises on purpose.

    The message is made here and only here: what happened, why, what to do.

    Args:
        what: One sentence: what is wrong.
        why: The cause, where it is known.
        fix: What the user can do about it.
        problems: All mismatches of one kind, one line each. The message shows the first few.
        path: The file or folder concerned.
        tensor_name: The tensor concerned, as the checkpoint names it.
    """

    def __init__(
        self,
        what: str,
        *,
        why: str = "",
        fix: str = "",
        problems: Sequence[str] = (),
        path: Path | None = None,
        tensor_name: str | None = None,
    ) -> None:
        self.what = what
        self.why = why
        self.fix = fix
        self.problems = tuple(problems)
        self.path = path
        self.tensor_name = tensor_name
        super().__init__(self._message())

    def _message(self) -> str:
        lines = [self.what]
        lines += [f"  - {problem}" for problem in self.problems[:SHOWN_PROBLEMS]]
        if (hidden := len(self.problems) - SHOWN_PROBLEMS) > 0:
            lines.append(f"  ... and {hidden} more")
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.fix:
            lines.append(f"  do:  {self.fix}")
        return printable("\n".join(lines), keep="\n")


def printable(text: str, *, keep: str = "") -> str:
    r"""Escape control characters and the like: names in files are anybody's.

    Args:
        text: What others may have written.
        keep: Characters to leave as they are though they are not printable.

    >>> printable("a\x1b[2J")
    'a\\x1b[2J'
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


class ConfigError(RvecError, ValueError):
    """What the user wrote (flag, YAML, loader configuration) is wrong."""


class CheckpointError(RvecError, ValueError):
    """A target or donor checkpoint can't be used."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the given path."""


class VectorFormatError(RvecError, ValueError):
    """Not a stored vector, or not one that this version reads."""


class VectorNotFoundError(VectorFormatError, FileNotFoundError):
    """There is no vector at the given path."""


class VectorCorruptError(RvecError, ValueError):
    """A vector whose bytes or values are damaged: cut off, NaN, infinite."""


class IncompatibleVectorError(RvecError, ValueError):
    """A vector that does not belong to this target: other names, shapes or architecture."""


class FetchError(RvecError, ConnectionError):
    """What is elsewhere can't be brought here now.

    The network or a server fails; of a URL also where there is no access, or no room for it.
    """


class EngineStartupError(RvecError, RuntimeError):
    """An engine ended, or hung, before it was ready.

    Args:
        last_lines: The end of what the engine printed.
        exit_status: The engine's own exit status, where it ended; negative for a signal.
    """

    def __init__(
        self,
        what: str,
        *,
        why: str = "",
        fix: str = "",
        last_lines: Sequence[str] = (),
        exit_status: int | None = None,
    ) -> None:
        super().__init__(what, why=why, fix=fix)
        self.last_lines = tuple(last_lines)
        self.exit_status = exit_status


class AlphaChangeError(RvecError, RuntimeError):
    """A live change of alpha did not come about."""


class AlphaChangeRefusedError(AlphaChangeError):
    """It was refused before anything was touched: the engine goes on at its old alpha."""


class AlphaChangeFailedError(AlphaChangeError):
    """It failed part-way: the engine's weights may be a mixture, and must never answer again."""


class UpstreamError(RvecError, ConnectionError):
    """An engine can't be reached, or broke off in the middle of an answer."""
