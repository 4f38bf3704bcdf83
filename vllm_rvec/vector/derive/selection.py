"""Which tensors of a vector a command works on: glob patterns on names. Imports no torch."""

from __future__ import annotations

import re
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from vllm_rvec.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

__all__ = ["select_names"]

SHOWN_NAMES: Final = 3
COMPARED_NAMES: Final = 500
"""Names among which near ones are looked for; layers count as one."""


def select_names(
    names: Collection[str], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> set[str]:
    """Choose tensors by patterns as `fnmatchcase` takes them; `*` matches dots too.

    Args:
        names: The vector's tensors.
        include: A name has to match one of them; without any, all names do.
        exclude: A name may match none of them. Goes before `include`.

    Raises:
        ConfigError: A pattern matches no tensor, or the patterns leave none.

    >>> sorted(select_names(["a.x", "a.y", "b.x"], include=["a.*"], exclude=["*.y"]))
    ['a.x']
    """
    if problems := [p for p in (*include, *exclude) if not _matching(names, p)]:
        raise ConfigError(
            "a pattern matches no tensor of the vector",
            problems=[f"{pattern}: near are {_near(names, pattern)}" for pattern in problems],
            why="patterns are matched against whole names, upper and lower case apart",
            fix="put * where anything may stand, as in '*.mlp.*'",
        )
    included = set(names) if not include else set().union(*(_matching(names, p) for p in include))
    selected = included.difference(*(_matching(names, p) for p in exclude))
    if not selected:
        raise ConfigError(
            "the patterns leave no tensor of the vector",
            why="a tensor that matches `exclude` is left out, whatever `include` says",
            fix="exclude less",
        )
    return selected


def _matching(names: Iterable[str], pattern: str) -> set[str]:
    return {name for name in names if fnmatchcase(name, pattern)}


def _near(names: Iterable[str], pattern: str) -> str:
    kinds = list(dict.fromkeys(re.sub(r"\d+", "*", name) for name in sorted(names)))
    near = get_close_matches(pattern, kinds[:COMPARED_NAMES], SHOWN_NAMES, cutoff=0.0)
    return ", ".join(near) or "none: the vector has no tensors"
