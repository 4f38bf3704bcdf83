"""YAML files that people write: read strictly, and refused in words that quote nothing of them.

Not here: what the settings mean (`recipe_file`, `serve.config`). Imports no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard, get_args, get_origin
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel

from vllm_rvec.checkpoint.remote import is_url
from vllm_rvec.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

__all__ = ["beside", "check_address", "problems_of", "read_settings"]

INT_TAG = "tag:yaml.org,2002:int"
FLOAT_TAG = "tag:yaml.org,2002:float"

CONTAINERS = (dict, Mapping, list, tuple, Sequence)
"""What holds further settings by a key or a number."""


def check_address(url: str) -> str:
    """Let a server's address through, without a slash or `/v1` at its end; for pydantic."""
    if not _is_address(url):
        msg = "should be http://HOST:PORT or https://HOST:PORT, without a key in it"
        raise ValueError(msg)
    return url.rstrip("/").removesuffix("/v1")


def _is_address(url: str) -> bool:
    if not url.startswith(("http://", "https://")) or not url.isprintable():
        return False
    if any(mark in url for mark in "@?# "):
        return False
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


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


def problems_of(
    error: ValidationError, model: type[BaseModel], given: Collection[str] = ()
) -> list[str]:
    """Say pydantic's problems in plain words, without the values: one may be a secret.

    Args:
        error: What checking raised.
        model: The settings that were checked.
        given: Names whose values came from the command line rather than a file.
    """
    return [_plain(problem, model, given) for problem in error.errors(include_url=False)]


def _plain(error: ErrorDetails, model: type[BaseModel], given: Collection[str]) -> str:
    # Steps in brackets are not names but pydantic's own: which form of a union, which key.
    steps = [str(step) for step in error["loc"] if not str(step).startswith("[")]
    name = ".".join(steps) or "the whole"
    where = " (from the command line)" if steps and steps[0] in given else ""
    match error["type"]:
        case "missing":
            problem = f"`{name}` is missing"
        case "extra_forbidden":
            problem = f"`{name}` is not a setting{_suggestion(steps, model)}"
        case "value_error" if not steps:
            problem = str(error["ctx"]["error"])
        case "value_error":
            problem = f"`{name}`: {error['ctx']['error']}"
        case _:
            problem = f"`{name}`: {error['msg'].replace('Input should', 'should')}"
    return problem + where


def _suggestion(steps: Sequence[str], model: type[BaseModel]) -> str:
    known = sorted({name for kind in _kinds_at(model, steps[:-1]) for name in _names(kind)})
    # Letters in the wrong order first: difflib finds `modle` more like `mode` than like `model`.
    close = [name for name in known if sorted(name) == sorted(steps[-1])]
    close += difflib.get_close_matches(steps[-1], known, n=1)
    return f"; did you mean `{close[0]}`?" if close else f"; there are {', '.join(known)}"


def _names(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _kinds_at(model: type[BaseModel], steps: Sequence[str]) -> list[type[BaseModel]]:
    """Find the settings that stand at a place: below a field, also in its mapping or list."""
    found: list[object] = [model]
    for step in steps:
        found = [inner for annotation in found for inner in _below(annotation, step)]
    return [kind for annotation in found for kind in _models_in(annotation)]


def _below(annotation: object, step: str) -> Iterator[object]:
    """Find the types of what stands one step below a value of a type."""
    if _is_model(annotation):
        fields = {field.alias or name: field for name, field in annotation.model_fields.items()}
        if step in fields:
            yield fields[step].annotation
        return
    arguments = get_args(annotation)
    if get_origin(annotation) in CONTAINERS:
        # The step is a key or a number, and says nothing: an alias may be called `split`.
        yield arguments[-1] if arguments[-1] is not ... else arguments[0]
        return
    for form in arguments:  # of a union, or annotated
        yield from _below(form, step)


def _is_model(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    """Find the settings that a value of a type may be itself."""
    if _is_model(annotation):
        yield annotation
    elif get_origin(annotation) not in CONTAINERS:
        for form in get_args(annotation):
            yield from _models_in(form)


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
