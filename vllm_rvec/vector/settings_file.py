"""YAML files that people write: read strictly, and refused in words that quote nothing of them.

Not here: what the settings mean (`recipe_file`, `serve.config`). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import yaml

from vllm_rvec.checkpoint.remote import is_url
from vllm_rvec.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["beside", "read_settings"]

INT_TAG = "tag:yaml.org,2002:int"
FLOAT_TAG = "tag:yaml.org,2002:float"


def read_settings(path: Path) -> dict[str, object]:
    """Read a file's top level, unchecked; an empty file has no settings.

    Raises:
        ConfigError: It can't be read, is no YAML, is no mapping, or has a key twice. No message
            quotes it.
    """
    try:
        # A SafeLoader: it makes plain values only.
        values = yaml.load(path.read_bytes(), Loader=_UniqueKeyLoader)  # noqa: S506
    except OSError as exc:
        raise ConfigError(
            f"the configuration {path} can't be read", why=exc.strerror or str(exc), path=path
        ) from exc
    except (yaml.YAMLError, RecursionError) as exc:
        # No cause: PyYAML's own text quotes the line, and the line may hold the API key.
        raise ConfigError(
            f"the configuration {path} is not valid YAML", why=_yaml_problem(exc), path=path
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"the configuration {path} is not a mapping",
            why=f"its top level is a {type(values).__name__}",
            fix="write one `name: value` a line",
            path=path,
        )
    return values


def beside(value: object, folder: Path) -> object:
    """Take a relative path from the file's folder, where it exists there; else it is a Hub id."""
    # A URL may be too long for a file's name, and no message may show it.
    if not isinstance(value, str) or not value or is_url(value) or not (folder / value).exists():
        return value
    return str((folder / value).absolute())


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; a lost variant needs one."""

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, object]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused below, in PyYAML's words
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"`{key}` is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_number(loader: _UniqueKeyLoader, node: yaml.ScalarNode) -> object:
    """YAML 1.1 takes `-1:2` for a number to base 60, which nobody writes any more."""
    if ":" in node.value:
        return node.value
    is_int = node.tag == INT_TAG
    return loader.construct_yaml_int(node) if is_int else loader.construct_yaml_float(node)


for _tag in (INT_TAG, FLOAT_TAG):
    _UniqueKeyLoader.add_constructor(_tag, _read_number)


def _yaml_problem(exc: yaml.YAMLError | RecursionError) -> str:
    if isinstance(exc, RecursionError):
        return "it is nested too deeply"
    if isinstance(exc, yaml.MarkedYAMLError) and exc.problem_mark is not None:
        mark = exc.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {exc.problem}"
    return "it is not plain UTF-8 text"
