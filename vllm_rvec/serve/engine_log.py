"""What vLLM prints, read: the root cause of a failure, the severity of a line, the phase it tells.

Measured on vLLM 0.32. A record looks like

    (Worker pid=4329) INFO 11-23 17:13:56 [default_loader.py:501] Loading weights took 0.01 seconds

and each further line of a record of several lines repeats that prefix. The text comes from other
processes, which may have read it in a checkpoint: it is not trusted.
"""

from __future__ import annotations

import codecs
import io
import re
from typing import TYPE_CHECKING

from vllm_rvec.errors import ERROR_MARKER

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["LONGEST_LINE", "LineSplitter", "clean", "phase", "root_cause", "severity"]

LONGEST_LINE = 64 * 1024
"""A line without an end is given out in pieces of about this many characters."""

"""What the loader writes before an error of ours."""

_ESCAPES = re.compile(
    r"""
    (?:\x1b\[|\x9b) [0-?]* [ -/]* [@-~]                     # CSI: colours, cursor
    | (?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f]) .*? (?:\x07|\x1b\\|\x9c|$)  # OSC, DCS: titles, links
    | \x1b [ -/]* [0-~]?                                    # any other
    """,
    re.VERBOSE,
)
_PREFIX = re.compile(
    r"(?P<process>\([^()]* pid=\d+\) )?"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] )?"
)
_EXCEPTION = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception)(?:: |$)")
_USAGE_ERROR = re.compile(r"\S+: error: (?P<problem>.+)")
_PYDANTIC = re.compile(r"\S*ValidationError: \d+ validation errors? for")
_POINTS_ELSEWHERE = re.compile(r"See (?:root cause|stack trace)", re.IGNORECASE)
_PHASES = (
    ("Initializing a V1 LLM engine", "starting workers"),
    ("Starting to load model", "loading weights"),
    ("Loading weights took", "warming up"),
    ("Starting vLLM server", "opening its port"),
)


class LineSplitter:
    """Cuts bytes into lines at newlines and at the carriage returns of progress bars."""

    def __init__(self) -> None:
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
        self._rest = ""

    def feed(self, chunk: bytes, *, is_last: bool = False) -> Iterator[str]:
        """Take the next bytes.

        Args:
            chunk: Bytes as they came, cut anywhere; what is not UTF-8 is replaced.
            is_last: No more bytes follow.

        Returns:
            The lines that are now complete, without their ends and without empty ones.
        """
        *lines, rest = (self._rest + self._decoder.decode(chunk, final=is_last)).split("\n")
        if is_last or len(rest) >= LONGEST_LINE:
            lines.append(rest)
            rest = ""
        self._rest = rest
        return (line for line in lines if line.strip())


def clean(line: str) -> str:
    """Strip a line of terminal control sequences and of all else that is not text.

    Args:
        line: A line as an engine printed it.

    Returns:
        The line, safe to print on a terminal.
    """
    plain = _ESCAPES.sub("", line).expandtabs(4)
    return "".join(c for c in plain if c.isprintable())


def severity(line: str) -> str | None:
    """Read a line's level.

    Args:
        line: A line as an engine printed it.

    Returns:
        DEBUG, INFO, WARNING, ERROR or CRITICAL; None where vLLM's logging did not write the line.
    """
    prefix = _PREFIX.match(clean(line))
    return prefix["level"] if prefix else None


def phase(line: str) -> str | None:
    """Tell which phase of starting a line begins.

    Args:
        line: A line as an engine printed it.

    Returns:
        The phase in two or three words; None where the line tells nothing.
    """
    return next((name for text, name in _PHASES if text in line), None)


def root_cause(lines: Sequence[str]) -> str:
    """Find why an engine failed in what it printed.

    The loader's own words come first, wherever they stand. Else it is the last line that looks
    like an exception or like argparse's complaint, leaving out those that only point elsewhere:
    vLLM raises again in each process up to the API server.

    Args:
        lines: What the engine printed, oldest first.

    Returns:
        The cause, usually one line, several where the loader wrote several; empty where nothing
        looks like one.
    """
    plain = [clean(line) for line in lines]
    return _loader_error(plain) or _last_complaint(plain)


def _loader_error(lines: Sequence[str]) -> str:
    for number, line in enumerate(lines):
        prefix, marker, text = line.partition(ERROR_MARKER)
        if marker:
            return "\n".join([text, *_continuation(lines[number + 1 :], prefix)])
    return ""


def _continuation(lines: Sequence[str], prefix: str) -> list[str]:
    """Collect the indented lines under the first; other processes' lines may come in between."""
    found: list[str] = []
    for line in lines:
        if prefix and not line.startswith(prefix):
            continue
        text = line.removeprefix(prefix)
        if not text.startswith("  "):
            break
        found.append(text)
    return found


def _last_complaint(lines: Sequence[str]) -> str:
    for number in range(len(lines) - 1, -1, -1):
        text = _without_prefix(lines[number])
        if usage := _USAGE_ERROR.match(text):
            return usage["problem"]
        if _PYDANTIC.match(text) and number + 1 < len(lines):
            return _pydantic_problem(_without_prefix(lines[number + 1]))
        if _EXCEPTION.match(text) and not _POINTS_ELSEWHERE.search(text):
            return text
    return ""


def _pydantic_problem(line: str) -> str:
    return line.strip().removeprefix("Value error, ").split(" [type=", 1)[0]


def _without_prefix(line: str) -> str:
    return _PREFIX.sub("", line, count=1)
