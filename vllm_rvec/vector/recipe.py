"""Which vectors are added to a target, where in the model, and how much of each.

A recipe is what people write, in the loader's extra configuration or in serve's YAML:

    vectors:
      - {path: reasoning, alpha: 0.8, layers: 8-20}
      - {path: style, alpha: {attention: 0.5, mlp: [0, 1], default: 0}}

Here it becomes one number for each tensor. The one alpha of a command line or of a request
multiplies them all. Imports no torch.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator

from vllm_rvec.errors import ConfigError
from vllm_rvec.vector.alpha import alpha_problem
from vllm_rvec.vector.derive.selection import select_names
from vllm_rvec.vector.module_names import KINDS, place_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

__all__ = ["GROUPS", "Alpha", "RecipeVector", "tensor_alphas"]

GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "attention": ("q", "k", "v", "kv", "qkv", "o"),
    "mlp": ("gate", "up", "gate_up", "down", "experts", "shared", "router"),
}
"""Names for several kinds of module at once."""

DEFAULT = "default"
"""What stands for all kinds that are not named."""

ALPHA_KEYS: Final = (*GROUPS, *(kind for kind in KINDS if kind != "biases"), DEFAULT)
"""What alpha may be given for. A bias is of its module's kind."""

LAYERS = re.compile(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?")


def _read_alpha(value: object) -> object:
    """Check what alpha may be: one problem is said once, not once for each form it could have."""
    if not isinstance(value, dict):
        return _read_setting(value)
    if not value or (unknown := sorted(str(key) for key in value if key not in ALPHA_KEYS)):
        problem = f"no kind of module: {', '.join(unknown)}" if value else "no kind of module"
        msg = f"{problem}; there are {', '.join(ALPHA_KEYS)}"
        raise ValueError(msg)
    return {str(key): _read_setting(setting) for key, setting in value.items()}


def _read_setting(value: object) -> float | list[float]:
    if isinstance(value, list | tuple) and value:
        return [_read_number(number) for number in value]
    return _read_number(value)


def _read_number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        msg = "should be a number, a list of numbers, or a mapping from kinds of module to these"
        raise ValueError(msg)  # noqa: TRY004 - pydantic collects ValueError, not TypeError
    if problem := alpha_problem(value):
        msg = f"{value} {problem}"
        raise ValueError(msg)
    return float(value)


def _check_layers(value: str) -> str:
    list(_layer_ranges(value))
    return value


Setting = float | list[float]
Alpha = Annotated[Setting | dict[str, Setting], PlainValidator(_read_alpha)]
"""One number; or a gradient, numbers that are spread evenly over the layers; or either of these for
each kind of module."""


class RecipeVector(BaseModel):
    """One vector of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    path: Annotated[str, Field(min_length=1)]
    """The stored vector: its folder, Hub id or URL."""

    alpha: Alpha = 1.0
    """Its scaling coefficient. A number; a gradient over the layers, such as [0, 1]; or a mapping
    from kinds of module to either: attention, mlp, single kinds as `inspect` names them, and
    `default` for the rest. A single kind goes before its group."""

    layers: Annotated[str, AfterValidator(_check_layers)] | None = None
    """Layers to which it is added: numbers and ranges with both ends, `0-3,8`. Nothing outside the
    layers (embedding, last norm, head) is, where this is given."""

    include: tuple[str, ...] = ()
    """Patterns of which a tensor's name has to match one; without any, all do."""

    exclude: tuple[str, ...] = ()
    """Patterns of which a tensor's name may match none. Goes before `include`."""


def tensor_alphas(vector: RecipeVector, names: Collection[str]) -> dict[str, float]:
    """Give every tensor of a vector its alpha.

    A gradient is read as mergekit reads it: of n layers, layer i is at i / (n - 1) of the way from
    the first number to the last, and takes the value there on the straight line between its two
    neighbours. What is before the layers takes the first number, what is behind them the last.

    Args:
        vector: What the recipe says.
        names: All tensors of the vector. The last layer among them is the model's last.

    Returns:
        Those to which the recipe does anything; 0 where it says 0.

    Raises:
        ConfigError: Patterns match nothing, a layer is not there, or a kind of module has no alpha.

    >>> tensor_alphas(RecipeVector(path="v", alpha=[0, 1]), [f"layers.{i}.mlp" for i in range(3)])
    {'layers.0.mlp': 0.0, 'layers.1.mlp': 0.5, 'layers.2.mlp': 1.0}
    """
    chosen = select_names(names, vector.include, vector.exclude)
    last_layer = max((place_of(name).layer or 0 for name in names), default=0)
    if vector.layers is not None:
        layers = _layers(vector, last_layer)
        chosen = {name for name in chosen if place_of(name).layer in layers}
    _check_kinds(vector, chosen)
    return {
        name: _value(_setting(vector.alpha, name), _depth(name, last_layer))
        for name in sorted(chosen)
    }


def _layers(vector: RecipeVector, last_layer: int) -> set[int]:
    layers = {
        layer for low, high in _layer_ranges(vector.layers or "") for layer in range(low, high + 1)
    }
    if beyond := sorted(layer for layer in layers if layer > last_layer):
        raise ConfigError(
            f"layers {vector.layers} of {vector.path} can't be used",
            why=f"layer {beyond[0]} is not there: the vector has layers 0 to {last_layer}",
            fix="both ends of a range are meant, and the first layer is 0",
        )
    return layers


def _layer_ranges(text: str) -> Iterator[tuple[int, int]]:
    for part in text.split(","):
        match = LAYERS.fullmatch(part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            msg = f"{part.strip()!r} is no layer or range of layers; write 8-20 or 0-3,8"
            raise ValueError(msg)
        yield int(match[1]), int(match[2] or match[1])


def _check_kinds(vector: RecipeVector, chosen: Collection[str]) -> None:
    """Refuse a mapping that leaves kinds out without a word: are they 0, or 1?"""
    if not isinstance(vector.alpha, dict) or DEFAULT in vector.alpha:
        return
    kinds = {_kind(name) for name in chosen if _key(vector.alpha, name) is None}
    if kinds:
        raise ConfigError(
            f"alpha of {vector.path} says nothing of {len(kinds)} kinds of module",
            problems=sorted(kinds),
            why="it could be 0 or 1 that is meant",
            fix="name them, or add `default`, or leave them out with `include` and `exclude`",
        )


def _setting(alpha: Setting | dict[str, Setting], name: str) -> Setting:
    if not isinstance(alpha, dict):
        return alpha
    return alpha[_key(alpha, name) or DEFAULT]


def _key(alpha: Mapping[str, object], name: str) -> str | None:
    kind = _kind(name)
    groups = (group for group, kinds in GROUPS.items() if kind in kinds)
    return next((key for key in (kind, *groups) if key in alpha), None)


def _kind(name: str) -> str:
    return place_of(name.removesuffix(".bias") + ".weight" * name.endswith(".bias")).kind


def _depth(name: str, last_layer: int) -> float:
    """Return how far through the model a tensor is: 0 at the first layer, 1 at the last."""
    place = place_of(name)
    if place.layer is not None:
        return place.layer / last_layer if last_layer else 1.0
    return 0.0 if place.kind == "embedding" else 1.0


def _value(setting: Setting, depth: float) -> float:
    if not isinstance(setting, list):
        return setting
    position = depth * (len(setting) - 1)
    low = int(position)
    high = min(len(setting) - 1, low + 1)
    part = position - low
    return (1 - part) * setting[low] + part * setting[high]
