"""Which metrics and labels a PromQL expression names. Whether it is one, promtool says."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Selector", "selectors"]

STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\b\s*\([^)]*\)")
RANGE = re.compile(r"\[[^\]]*\]")
NAME = re.compile(r"([a-zA-Z_:][\w:]*)(?![\w:])\s*(\{[^}]*\}|)(?!\s*\()")
OPERATORS = frozenset({"and", "or", "unless", "offset", "bool"})
MATCHING = frozenset({"by", "without", "on", "ignoring", "group_left", "group_right"})


@dataclass(frozen=True, slots=True)
class Selector:
    """One metric as an expression names it."""

    metric: str
    labels: frozenset[str]
    """Those that it is chosen by."""


def selectors(expression: str) -> list[Selector]:
    """Find all of them."""
    text = expression
    for pattern in (STRING, RANGE, GROUPING):
        text = pattern.sub(" ", text)
    text = re.sub(r"(?<![\w:.])[\d.]+\w*", " ", text)  # numbers and durations
    return [
        Selector(name, frozenset(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", braces)))
        for name, braces in NAME.findall(text)
        if name not in OPERATORS | MATCHING
    ]
