"""Text that others wrote, made fit for a terminal or a picture."""

from pathlib import Path

from rich.text import Text

from vllm_rvec.errors import printable as escaped

__all__ = ["printable", "titled"]

MAX_PATH = 400
"""Characters of a path that are shown."""


def printable(text: str, limit: int = 80) -> str:
    r"""Escape control characters and the like, and cut what is too long.

    Args:
        text: Names of files, tensors and donors: whatever a manifest holds.
        limit: Characters in all.

    >>> printable("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    shown = escaped(text[: limit + 1])
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


def titled(what: str, path: Path) -> Text:
    r"""Make a table's title of a path: as text, for rich takes brackets in a string for markup.

    >>> titled("vector", Path("v[bold]\x1b")).plain
    'vector v[bold]\\x1b'
    """
    return Text(f"{what} {printable(str(path), MAX_PATH)}")
