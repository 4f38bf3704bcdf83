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
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
)

from vllm_rvec.checkpoint.remote import shown
from vllm_rvec.errors import ConfigError
from vllm_rvec.vector.alpha import alpha_problem
from vllm_rvec.vector.derive.selection import select_names
from vllm_rvec.vector.module_names import KINDS, place_of, stack_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

__all__ = ["GROUPS", "Alpha", "RecipeVector", "Vectors", "tensor_alphas"]

GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "attention": ("q", "k", "v", "kv", "qkv", "o", "sinks"),
    "mlp": ("gate", "up", "gate_up", "down", "experts", "shared", "router"),
}
"""Names for several kinds of module at once."""

DEFAULT = "default"
"""What stands for all kinds that are not named."""

ALPHA_KEYS: Final = (*GROUPS, *(kind for kind in KINDS if kind != "biases"), DEFAULT)
"""What alpha may be given for. A bias is of its module's kind."""

LAYERS = re.compile(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?")

NAME = re.compile(r"[!-+\--<>-~]+")


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


def _one_layer(value: object) -> object:
    """YAML reads `layers: 8` as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _check_layers(value: str) -> str:
    list(_layer_ranges(value))
    return value


def _check_name(value: str) -> str:
    # It stands in HTTP headers.
    if not NAME.fullmatch(value):
        msg = "a vector's name is printable ASCII text without spaces, commas or ="
        raise ValueError(msg)
    return value


Setting = float | list[float]
Alpha = Annotated[Setting | dict[str, Setting], PlainValidator(_read_alpha)]
"""One number; or a gradient, numbers that are spread evenly over the layers; or either of these for
each kind of module."""
Layers = Annotated[str, BeforeValidator(_one_layer), AfterValidator(_check_layers)]


class RecipeVector(BaseModel):
    """One vector of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    path: Annotated[str, Field(min_length=1)]
    """The stored vector: its folder, Hub id or URL."""

    name: Annotated[str, AfterValidator(_check_name)] | None = None
    """What requests to a dial engine call it; without one, as its folder is called."""

    alpha: Alpha = 1.0
    """Its scaling coefficient. A number; a gradient over the layers, such as [0, 1]; or a mapping
    from kinds of module to either: attention, mlp, single kinds as `inspect` names them, and
    `default` for the rest. A single kind goes before its group."""

    layers: Layers | None = None
    """Layers to which it is added: numbers and ranges with both ends, `0-3,8`. Nothing outside the
    layers (embedding, last norm, head) is, where this is given."""

    include: tuple[str, ...] = ()
    """Patterns of which a tensor's name has to match one; without any, all do."""

    exclude: tuple[str, ...] = ()
    """Patterns of which a tensor's name may match none. Goes before `include`."""


def _check_some(vectors: tuple[RecipeVector, ...]) -> tuple[RecipeVector, ...]:
    # Not `min_length`: pydantic counts what is left of them, and says so beside each mistake.
    if not vectors:
        msg = "should have at least one vector"
        raise ValueError(msg)
    return vectors


Vectors = Annotated[tuple[RecipeVector, ...], AfterValidator(_check_some)]
"""A recipe, in the order of adding."""


def tensor_alphas(
    vector: RecipeVector, names: Collection[str], *, is_complete: bool = True
) -> dict[str, float]:
    """Give every tensor of a vector its alpha.

    A gradient is read as mergekit reads it: of n layers, layer i is at i / (n - 1) of the way from
    the first number to the last, and takes the value there on the straight line between its two
    neighbours; the one layer of a model that has no other takes the last. What is in no layer takes
    the first, and that is the last norm and the head, too. Where a model has several stacks of
    layers, vision beside language, each has the whole way to itself.

    Args:
        vector: What the recipe says.
        names: All tensors of the vector. The last layer among them is the model's last.
        is_complete: Whether the vector is known to have a part for all of a model's layers.

    Returns:
        Those to which the recipe does anything; 0 where it says 0.

    Raises:
        ConfigError: Patterns, layers or kinds of module match nothing, a kind has no alpha, or a
            gradient is given and it is not known over how many layers.

    >>> tensor_alphas(RecipeVector(path="v", alpha=[0, 1]), [f"layers.{i}.mlp" for i in range(3)])
    {'layers.0.mlp': 0.0, 'layers.1.mlp': 0.5, 'layers.2.mlp': 1.0}
    """
    sites = {name: _site(name) for name in names}
    last_layers = _last_layers(sites.values())
    _check_keys(vector, {site.kind for site in sites.values()})
    chosen = _chosen(vector, sites)
    _check_kinds(vector, {sites[name].kind for name in chosen})
    settings = {name: _setting(vector.alpha, sites[name].kind) for name in sorted(chosen)}
    if not is_complete:
        _refuse_gradients(vector, settings.values(), last_layers)
    return {name: _value(said, _depth(sites[name], last_layers)) for name, said in settings.items()}


class _Site(NamedTuple):
    """Where a tensor sits; computed once, for large models have tens of thousands."""

    layer: int | None
    stack: str | None
    kind: str
    """A bias is of its module's."""


def _site(name: str) -> _Site:
    is_bias = name.endswith(".bias")
    place = place_of(name.removesuffix(".bias") + ".weight" if is_bias else name)
    return _Site(place.layer, stack_of(name), place.kind)


def _chosen(vector: RecipeVector, sites: Mapping[str, _Site]) -> set[str]:
    """Return what patterns and layers leave."""
    try:
        chosen = select_names(sites, vector.include, vector.exclude)
    except ConfigError as exc:
        what = f"{shown(vector.path)}: {exc.what}"
        raise ConfigError(what, problems=exc.problems, why=exc.why, fix=exc.fix) from exc
    if vector.layers is None:
        return chosen
    layers = _layers(vector, {site.layer for site in sites.values()})
    if left := {name for name in chosen if sites[name].layer in layers}:
        return left
    raise ConfigError(
        f"layers {vector.layers} of {shown(vector.path)} hold nothing that its patterns leave",
        why="only what `layers`, `include` and `exclude` all let through is added",
        fix="leave out one of them; embedding, last norm and head, which are in no layer, need an "
        "entry without `layers`",
    )


def _layers(vector: RecipeVector, there: Collection[int | None]) -> set[int]:
    layers = {
        layer for low, high in _layer_ranges(vector.layers or "") for layer in range(low, high + 1)
    }
    if missing := sorted(layers.difference(there)):
        found = sorted(layer for layer in there if layer is not None)
        raise ConfigError(
            f"layers {vector.layers} of {shown(vector.path)} can't be used",
            why=f"layer {missing[0]} is not there: the vector has "
            + (f"layers {_as_ranges(found)}" if found else "no layers"),
            fix="both ends of a range are meant, and the first layer is 0",
        )
    return layers


def _as_ranges(layers: Sequence[int]) -> str:
    """Write layers, in order, as a recipe does."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    pairs = zip(starts, ends, strict=True)
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in pairs)


def _layer_ranges(text: str) -> Iterator[tuple[int, int]]:
    for part in text.split(","):
        match = LAYERS.fullmatch(part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            msg = f"{part.strip()!r} is no layer or range of layers; write 8-20 or 0-3,8"
            raise ValueError(msg)
        yield int(match[1]), int(match[2] or match[1])


def _check_keys(vector: RecipeVector, kinds: Collection[str]) -> None:
    """Refuse an alpha for what the model does not have, as q is where q, k and v are one matrix."""
    if not isinstance(vector.alpha, dict):
        return
    keys = (key for key in vector.alpha if key != DEFAULT)
    if idle := [key for key in keys if not set(kinds).intersection(GROUPS.get(key, (key,)))]:
        raise ConfigError(
            f"alpha of {shown(vector.path)} is given for what the vector does not have",
            problems=idle,
            why=f"its kinds of module are {', '.join(sorted(kinds))}",
            fix="use these, or the groups attention and mlp",
        )


def _refuse_gradients(
    vector: RecipeVector, settings: Iterable[Setting], last_layers: Mapping[str, int]
) -> None:
    """Refuse to spread numbers over layers of which some may be missing."""
    if all(not isinstance(setting, list) or len(setting) == 1 for setting in settings):
        return
    last = max(last_layers.values(), default=0)
    raise ConfigError(
        f"{shown(vector.path)} can't be added by a gradient",
        why=f"its last layer is {last}, and it does not say whether the model has more",
        fix="make it anew with `import-lora --base`, or give numbers, not lists",
    )


def _check_kinds(vector: RecipeVector, kinds: Collection[str]) -> None:
    """Refuse a mapping that leaves kinds out without a word: are they 0, or 1?"""
    if not isinstance(vector.alpha, dict) or DEFAULT in vector.alpha:
        return
    if silent := sorted(kind for kind in kinds if _key(vector.alpha, kind) is None):
        raise ConfigError(
            f"alpha of {shown(vector.path)} says nothing of {len(silent)} kinds of module",
            problems=silent,
            why="it could be 0 or 1 that is meant",
            fix="add `default`, or name them, or leave them out with `include` and `exclude`",
        )


def _setting(alpha: Setting | dict[str, Setting], kind: str) -> Setting:
    if not isinstance(alpha, dict):
        return alpha
    return alpha[_key(alpha, kind) or DEFAULT]


def _key(alpha: Mapping[str, object], kind: str) -> str | None:
    groups = (group for group, kinds in GROUPS.items() if kind in kinds)
    return next((key for key in (kind, *groups) if key in alpha), None)


def _last_layers(sites: Iterable[_Site]) -> dict[str, int]:
    """Return the last layer of each stack."""
    last: dict[str, int] = {}
    for layer, stack, _ in sites:
        if layer is not None and stack is not None:
            last[stack] = max(layer, last.get(stack, 0))
    return last


def _depth(site: _Site, last_layers: Mapping[str, int]) -> float:
    """Return how far through its stack a tensor is: 0 in the first layer or in none, 1 in the last.

    mergekit 0.1.5 has 0 for what comes after the layers, too (`plan_module` in its plan.py).
    """
    if site.layer is None or site.stack is None:
        return 0.0
    return site.layer / last if (last := last_layers[site.stack]) else 1.0


def _value(setting: Setting, depth: float) -> float:
    if not isinstance(setting, list):
        return setting
    position = depth * (len(setting) - 1)
    low = int(position)
    high = min(len(setting) - 1, low + 1)
    part = position - low
    return (1 - part) * setting[low] + part * setting[high]
