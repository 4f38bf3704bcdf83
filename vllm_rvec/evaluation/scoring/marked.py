r"""Where in a text its final answer stands: behind `Answer:`, `the answer is`, or in `\boxed{}`.

Every pattern here runs in time proportional to the text: it is the model's, and may be anything.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["after_marker", "boxed", "last_line", "marked", "shorn"]

MARKER: Final = re.compile(r"\banswer\b[\s*_]*(?:is\b|are\b|:|=)[\s*_:=]*", re.IGNORECASE)
r"""`Answer: 5`, `**Final answer:** 5`, `The answer is 5`; line ends in between are passed over."""

LATEX_TEXT: Final = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
"""In a box, words stand so."""

BOXES: Final = (r"\boxed{", r"\fbox{")
DECORATION: Final = " \t\r\n*_`\"'“”‘’$"  # noqa: RUF001 - the quotation marks that models write


def boxed(text: str) -> str | None:
    r"""Find what the last `\boxed{...}` holds, words as such; None where none is closed.

    >>> boxed(r"so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> boxed(r"so \boxed{\text{(B)}}.")
    '(B)'
    """
    start = max((text.rfind(box) + len(box) for box in BOXES if box in text), default=-1)
    if start < 0:
        return None
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return LATEX_TEXT.sub(r"\1", text[start:place])
    return None


def marked(text: str) -> str | None:
    """Find the rest of the line behind the last `Answer:` or `answer is` that something follows.

    >>> marked("The answer is 4, no: answer: 5 pens.")
    '5 pens.'
    """
    for found in reversed(list(MARKER.finditer(text))):
        end = text.find("\n", found.end())
        if rest := text[found.end() : end if end >= 0 else None].strip():
            return rest
    return None


def after_marker(text: str, marker: str) -> str | None:
    """Find the rest of the line behind a marker's last occurrence; None where there is none."""
    _, found, rest = text.rpartition(marker)
    return rest.strip().partition("\n")[0].strip() if found else None


def last_line(text: str) -> str:
    """Return the last line that isn't blank; empty where there is none."""
    return text.strip().rpartition("\n")[2].strip()


def shorn(text: str) -> str:
    """Take Markdown's stars, quotation marks and a final dot off a short answer.

    >>> shorn('**"Yes".**')
    'Yes'
    """
    return text.strip(DECORATION).removesuffix(".").strip(DECORATION)
