"""What a user may write in `--model-loader-extra-config` for `--load-format rvec`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from vllm_rvec.errors import ConfigError
from vllm_rvec.loader.formats import BASE_FORMATS, VLLM_KEYS, format_problem
from vllm_rvec.vector.alpha import AlphaNumber
from vllm_rvec.vector.compatibility.structure import Vocabulary
from vllm_rvec.vector.dial import DEFAULT_RANGE, AlphaRange, Alphas, Dial, VectorDtype, vector_names
from vllm_rvec.vector.recipe import RecipeVector, Vectors

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LoaderConfig"]


class LoaderConfig(BaseModel):
    """The loader's own keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    vector: str = Field(default="", min_length=1)
    """The stored vector: its folder, Hub id or URL."""
    vectors: Annotated[Vectors, Field(strict=False)] = ()
    """In place of `vector`: several, added in this order, each with an alpha of its own."""
    alpha: AlphaNumber = 1.0
    """Scaling coefficient of the vector, which multiplies those of `vectors`; 0 serves the target
    unchanged."""
    vocabulary: Vocabulary = "strict"
    """What to do where vector and target have different numbers of embedding rows: refuse, add the
    rows of both, or leave embedding and output head as they are."""
    force: bool = False
    """Go on where the check refuses: log it, and leave unfused what does not fit."""
    mode: Literal["fused", "dial"] = "fused"
    """fused: the vectors are added to the weights, at one alpha. dial: they are kept beside them,
    and each request has an alpha of its own; then `alpha` is for requests that name none."""
    alpha_range: Annotated[tuple[AlphaNumber, AlphaNumber], Field(strict=False)] = DEFAULT_RANGE
    """Of a dial: between which alphas requests may choose."""
    variants: dict[str, AlphaNumber | dict[str, AlphaNumber]] = {}
    """Of a dial: names of models, and the alpha of each, or one for each vector."""
    vector_dtype: VectorDtype = "auto"
    """Of a dial: how it keeps vectors. auto is the model's dtype; int8 takes half of bfloat16's
    memory, with one scale a row."""
    fuse_on: Literal["auto", "host", "device"] = "auto"
    """Where to add what goes to parameters on a GPU; auto measures which is faster."""
    base_format: str = "safetensors"
    """How vLLM reads the target's own tensors: one of `BASE_FORMATS`."""

    @field_validator("base_format")
    @classmethod
    def _check_base_format(cls, name: str) -> str:
        if problem := format_problem(name):
            raise ValueError(problem)
        return name

    kv_connector: Literal["refuse", "allow"] = "refuse"
    """A KV connector whose keys don't know alpha is refused, unless the user says here that each
    vector and alpha has a store of its own."""

    @model_validator(mode="after")
    def _check_dial(self) -> LoaderConfig:
        if self.alpha_range[0] > self.alpha_range[1]:
            msg = "alpha_range: the first number is larger than the second"
            raise ValueError(msg)
        low, high = self.alpha_range
        if (
            self.mode == "dial"
            and "alpha" in self.model_fields_set
            and not low <= self.alpha <= high
        ):
            msg = "alpha: it is outside of alpha_range"
            raise ValueError(msg)
        names = vector_names(self.recipe)
        for variant, alpha in self.variants.items():
            if isinstance(alpha, dict) and (strange := alpha.keys() - set(names)):
                msg = f"variants: {variant}: no vector is called {', '.join(sorted(strange))}; "
                raise ValueError(msg + f"there are {', '.join(names)}")
        return self

    @property
    def dial(self) -> Dial:
        """What a dial engine answers to."""
        names = vector_names(self.recipe)
        variants = {
            name: tuple(alpha.get(v, 0.0) for v in names)
            if isinstance(alpha, dict)
            else (alpha,) * len(names)
            for name, alpha in self.variants.items()
        }
        return Dial(names, variants, AlphaRange(*self.alpha_range))

    @property
    def default_alphas(self) -> Alphas:
        """Of requests to a dial that say nothing.

        `alpha` where it is given; else the first variant's, or where there are none, what is
        nearest to 1 in range.
        """
        if "alpha" in self.model_fields_set:
            return (self.alpha,) * len(self.recipe)
        if self.variants:
            return next(iter(self.dial.variants.values()))
        return (min(max(self.alpha, self.alpha_range[0]), self.alpha_range[1]),) * len(self.recipe)

    @property
    def recipe(self) -> tuple[RecipeVector, ...]:
        """What is added, in this order."""
        return self.vectors or (RecipeVector(path=self.vector),)

    @classmethod
    def split(cls, extra: object) -> tuple[LoaderConfig, dict[str, Any]]:
        """Take our keys out of vLLM's extra configuration.

        Args:
            extra: `model_loader_extra_config`, as vLLM hands it over.

        Returns:
            Our configuration, and the keys that are vLLM's.

        Raises:
            ConfigError: No mapping, an unknown key, a missing vector, an alpha that is no finite
                number, a format that can't be used: all of them at once. Keys of another format.
        """
        if not isinstance(extra, dict):
            raise ConfigError("--model-loader-extra-config must be a JSON object", fix=_EXAMPLE)
        ours = {key: value for key, value in extra.items() if key not in VLLM_KEYS}
        problems = list(_vector_problems(ours))
        try:
            config = cls.model_validate(ours)
        except ValidationError as exc:
            problems += [_problem(error["loc"], error["msg"]) for error in exc.errors()]
        if problems:
            known = ", ".join((*cls.model_fields, *VLLM_KEYS))
            raise ConfigError(
                "--model-loader-extra-config is not right for --load-format rvec",
                problems=problems,
                why=f"the keys are: {known}",
                fix=_EXAMPLE,
            )
        vllm_keys = {key: value for key, value in extra.items() if key in VLLM_KEYS}
        if strange := [key for key in vllm_keys if key not in BASE_FORMATS[config.base_format]]:
            raise ConfigError(
                f"keys that base_format {config.base_format} does not have",
                problems=[f"{key}: of {', '.join(_formats_with(key))}" for key in strange],
                fix="leave them out, or set base_format to the loader that has them",
            )
        return config, vllm_keys


_EXAMPLE = """for example --model-loader-extra-config '{"vector": "DIR", "alpha": 0.5}'"""


def _vector_problems(ours: dict[str, Any]) -> Iterator[str]:
    if not ours.keys() & {"vector", "vectors"}:
        yield "key 'vector' is missing"
    if {"vector", "vectors"} <= ours.keys():
        yield "keys 'vector' and 'vectors' are both there; give one of them"


def _formats_with(key: str) -> list[str]:
    return [name for name, keys in BASE_FORMATS.items() if key in keys]


def _problem(location: tuple[int | str, ...], message: str) -> str:
    key = ".".join(map(str, location))
    if message == "Extra inputs are not permitted":
        return f"unknown key {key!r}"
    if message == "Field required":
        return f"key {key!r} is missing"
    return f"{key}: {message.removeprefix('Value error, ')}"
