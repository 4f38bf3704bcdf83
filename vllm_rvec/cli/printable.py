"""Text that others wrote, made fit for a terminal or a picture."""

from vllm_rvec.errors import printable as escaped

__all__ = ["printable"]


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
