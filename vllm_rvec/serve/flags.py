"""vLLM's flags as words of a command line: made from YAML, found again, taken out.

Words are all that is known of them here: which flags matter, and what for, is for `plan` and `mode`
to say.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

__all__ = ["as_arguments", "flag_name", "flag_names", "flag_value", "stands_for", "take_values"]


def as_arguments(flags: Mapping[str, object]) -> Iterator[str]:
    """Turn `max-model-len: 512` into `--max-model-len 512`."""
    for key, value in flags.items():
        name = key.lstrip("-").replace("_", "-")
        match value:
            case bool():
                yield f"--{name}" if value else f"--no-{name}"
            case list():
                yield from (f"--{name}", *map(_as_text, value))
            case _:
                yield from (f"--{name}", _as_text(value))


def flag_name(argument: str) -> str:
    """Find a flag's name; empty for what is not a flag with two dashes.

    >>> flag_name("--Name_of.key=value")
    'Name-of'
    """
    if not argument.startswith("--"):
        return ""
    return argument[2:].split("=", 1)[0].split(".", 1)[0].replace("_", "-")


def flag_names(arguments: Sequence[str]) -> Iterator[str]:
    """Find the names of all flags with two dashes, in their order."""
    return filter(None, map(flag_name, arguments))


def stands_for(name: str, flags: Collection[str]) -> str | None:
    """Find the flag that `name` stands for: argparse also takes any unambiguous beginning."""
    if name in flags:
        return name
    return next((flag for flag in flags if name and flag.startswith(name)), None)


def flag_value(arguments: Sequence[str], at: int) -> str:
    """Read the value of the flag at a place; empty where none follows."""
    _, equals, value = arguments[at].partition("=")
    if equals:
        return value
    return arguments[at + 1] if at + 1 < len(arguments) else ""


def take_values(arguments: Sequence[str], flag: str) -> tuple[list[list[str]], list[str]]:
    """Part one flag, which takes any number of values, from the others.

    Args:
        arguments: vLLM's command line, or the user's part of it.
        flag: Its name, without dashes.

    Returns:
        The values, a list for each time that the flag is there, and the other words.

    >>> take_values(["--a", "x", "y", "--b", "1", "--a=z"], "a")
    ([['x', 'y'], ['z']], ['--b', '1'])
    """
    values: list[list[str]] = []
    rest: list[str] = []
    is_ours = False
    for word in arguments:
        if word.startswith("-"):
            is_ours = stands_for(flag_name(word), [flag]) is not None
            if is_ours:
                _, equals, value = word.partition("=")
                values.append([value] if equals else [])
                is_ours = not equals
                continue
        if is_ours:
            values[-1].append(word)
        else:
            rest.append(word)
    return values, rest


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
