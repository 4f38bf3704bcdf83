"""What people write to serve: the YAML file, and the flags that override it.

Not here: what becomes of it. `plan` turns a `ServeConfig` into engines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    SecretStr,
    ValidationError,
    model_validator,
)

from vllm_rvec.errors import ConfigError
from vllm_rvec.vector.alpha import alpha_problem, alpha_text
from vllm_rvec.vector.compatibility.structure import Vocabulary
from vllm_rvec.vector.dial import DEFAULT_RANGE, Dial, VectorDtype, vector_names
from vllm_rvec.vector.dial_settings import Range, VariantAlpha, alphas_of, refuse_bool
from vllm_rvec.vector.recipe import RecipeVector, Vectors
from vllm_rvec.vector.recipe_file import vectors_beside
from vllm_rvec.vector.settings_file import beside, problems_of, read_settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path


__all__ = [
    "ServeConfig",
    "VariantConfig",
    "load_config",
    "parse_alphas",
    "variant_name",
    "variants_from_alphas",
]

DEFAULT_ALPHAS = (0.0, 1.0)
ENGINE_KEY_VARIABLE = "VLLM_API_KEY"
CLIENT_KEY_VARIABLE = "VLLM_RVEC_API_KEY"
"""Where `serve` finds the key that clients must send, where no flag gives it."""
ADMIN_KEY_VARIABLE = "VLLM_RVEC_ADMIN_KEY"
"""As above, for the key of who may change variants."""


def _check_variant_name(name: str) -> str:
    if not name or "," in name or not name.isprintable() or any(c.isspace() for c in name):
        msg = "a variant's name is printable text without spaces or commas"
        raise ValueError(msg)
    return name


def _check_variable_name(name: str) -> str:
    if not name or "=" in name or "\0" in name:
        msg = "not a name that an environment variable can have"
        raise ValueError(msg)
    if name == ENGINE_KEY_VARIABLE:
        msg = "each engine gets a key of its own; for the key that clients send, set `api_key`"
        raise ValueError(msg)
    return name


def _check_variable_value(value: str) -> str:
    if "\0" in value:
        msg = "an environment variable can't hold a NUL character"
        raise ValueError(msg)
    return value


def _check_flag_value(value: JsonValue) -> JsonValue:
    if value is None:
        msg = "has no value; for a flag that takes none, write true"
        raise ValueError(msg)
    return value


VariantName = Annotated[str, AfterValidator(_check_variant_name)]
VariableName = Annotated[str, AfterValidator(_check_variable_name)]
# YAML reads `VLLM_CPU_KVCACHE_SPACE: 1` as a number; the environment holds text.
VariableValue = Annotated[
    str, Field(coerce_numbers_to_str=True), AfterValidator(_check_variable_value)
]
FlagValue = Annotated[JsonValue, AfterValidator(_check_flag_value)]


class VariantConfig(BaseModel):
    """One variant: how much of the vector is added."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    alpha: VariantAlpha
    """The vector's scaling coefficient; 0 is the target model unchanged. With a dial also a mapping
    from vectors' names to numbers, 0 for those that are not named."""


class ServeConfig(BaseModel):
    """Everything that `vllm-rvec serve` can be told."""

    # hide_input_in_errors: pydantic's own message would quote the API key.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    model: Annotated[str, Field(min_length=1)]
    """The target: a local folder or a Hugging Face Hub id."""

    vector: Annotated[str, Field(min_length=1)] | None = None
    """The stored vector: its folder, Hub id or URL."""

    vectors: Vectors | None = None
    """In place of `vector`: several, added in this order, each where and as much as it says. A
    variant's alpha multiplies all of theirs."""

    vocabulary: Vocabulary = "strict"
    """What to do where vector and target have different numbers of embedding rows: refuse, add the
    rows of both, or leave embedding and output head as they are."""

    force: bool = False
    """Go on where the check of vector and target refuses; what does not fit stays unchanged."""

    variants: Annotated[dict[VariantName, VariantConfig], Field(min_length=1)] = Field(
        default_factory=lambda: variants_from_alphas(DEFAULT_ALPHAS)
    )
    """The variants by name, in the order in which they start. Without any: base and enhanced@1."""

    mode: Literal["auto", "fused", "dial"] = "auto"
    """How engines hold the vectors: fused, an engine for each variant, whose weights are the sum;
    or dial, one engine that keeps them apart and answers any alpha. auto takes the dial where there
    are several alphas and nothing rules it out."""

    alpha_range: Range | None = None
    """With a dial: between which alphas requests may choose, as `-1:2`, which is the default."""

    vector_dtype: VectorDtype = "auto"
    """With a dial: how the engine keeps the vectors; auto takes the target's own dtype."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """The address on which clients are answered. Engines always stay on the loopback."""

    port: Annotated[int, BeforeValidator(refuse_bool), Field(ge=0, le=65535)] = 8000
    """The port on which clients are answered; 0 takes any free one."""

    api_key: Annotated[SecretStr, Field(min_length=1)] | None = None
    """What clients must send as `Authorization: Bearer ...`; without it, nothing is asked for."""

    admin_key: Annotated[SecretStr, Field(min_length=1)] | None = None
    """What must be sent, in the same way, to change a variant's alpha while it serves; without it,
    nobody can."""

    drain_seconds: Annotated[int, BeforeValidator(refuse_bool), Field(ge=0)] = 30
    """How long requests in flight may go on once the server has been told to stop, or a variant's
    alpha is to be changed."""

    example: Annotated[str, Field(min_length=1)] = "Hello"
    """What the curl line asks that is printed once all is ready."""

    engine_flags: dict[str, FlagValue] = Field(default_factory=dict, alias="engine")
    """vLLM's own flags, without the dashes: `max-model-len: 512`. true is the bare flag, false is
    `--no-...`, a list repeats the values, a mapping is passed as JSON. In YAML: `engine`."""

    env: dict[VariableName, VariableValue] = Field(default_factory=dict, repr=False)
    """Environment variables for the engines, on top of this process's own; may hold secrets."""

    routing: dict[str, JsonValue] = Field(default_factory=dict)
    """Everything about traffic: aliases and splits, keys and limits, results. Checked by the
    router, whose schema it has (`vllm-rvec check-config`)."""

    _vector_name: str | None = PrivateAttr(default=None)
    """What `vector` is called, once it was found somewhere else."""

    @model_validator(mode="after")
    def _check_keys(self) -> ServeConfig:
        if self.admin_key is not None and self.admin_key == self.api_key:
            msg = "`admin_key` is the same as `api_key`: every client could change variants"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _check_vector_names(self) -> ServeConfig:
        names = vector_names(self.recipe)
        for variant, said in self.variants.items():
            given = said.alpha if isinstance(said.alpha, dict) else {}
            if unknown := [name for name in given if name not in names]:
                msg = f"`variants.{variant}.alpha`: no vector is called {', '.join(unknown)}; "
                raise ValueError(msg + f"there are {', '.join(names)}")
        return self

    @property
    def has_admin(self) -> bool:
        """Whether somebody may change alphas while it serves."""
        return self.admin_key is not None or self.routing.get("admin_key_sha256") is not None

    @property
    def aliases(self) -> tuple[str, ...]:
        """The names that stand for variants, which engines must answer to as well."""
        aliases = self.routing.get("aliases")
        return tuple(aliases) if isinstance(aliases, dict) else ()

    @property
    def recipe(self) -> tuple[RecipeVector, ...]:
        """What is added, in this order."""
        if self.vectors is not None:
            return self.vectors
        # Whether there is one at all is checked in `load_config`, with all else.
        return (RecipeVector.model_construct(path=self.vector or "", name=self._vector_name),)

    @property
    def is_recipe(self) -> bool:
        """Whether `vectors` says where the vectors are added; else all of one is."""
        return self.vectors is not None

    def found_in(self, folders: Sequence[Path]) -> ServeConfig:
        """The same configuration with every vector's own folder, in the order of `recipe`.

        Their names stay: a folder where fetched ones are kept is called something else.
        """
        names = vector_names(self.recipe)
        if self.vectors is None:
            found = self.model_copy(update={"vector": str(folders[0])})
            found._vector_name = names[0]  # noqa: SLF001 - of our own copy
            return found
        vectors = tuple(
            vector.model_copy(update={"path": str(folder), "name": name})
            for vector, folder, name in zip(self.vectors, folders, names, strict=True)
        )
        return self.model_copy(update={"vectors": vectors})

    @property
    def dial(self) -> Dial:
        """What a dial engine would answer to."""
        names = vector_names(self.recipe)
        alphas = {name: alphas_of(said.alpha, names) for name, said in self.variants.items()}
        return Dial(names, alphas, self.alpha_range or DEFAULT_RANGE)


def variant_name(alpha: float) -> str:
    """Name the variant that has `alpha`.

    Args:
        alpha: The scaling coefficient.

    Returns:
        `base` for zero, else `enhanced@` and the shortest text that reads back as `alpha`.

    >>> [variant_name(alpha) for alpha in (-0.0, 0.5, 1.0, -1.0)]
    ['base', 'enhanced@0.5', 'enhanced@1', 'enhanced@-1']
    """
    if alpha == 0:
        return "base"
    return f"enhanced@{alpha_text(alpha)}"


def variants_from_alphas(alphas: tuple[float, ...]) -> dict[str, VariantConfig]:
    """Give each alpha a variant under its own name.

    Args:
        alphas: Different scaling coefficients, as `parse_alphas` returns them.

    Returns:
        What `ServeConfig.variants` holds.
    """
    return {variant_name(alpha): VariantConfig(alpha=alpha) for alpha in alphas}


def parse_alphas(text: str) -> tuple[float, ...]:
    """Read alphas as they are typed: `0,0.5,1`.

    Args:
        text: Numbers separated by commas.

    Returns:
        The numbers, in the order given.

    Raises:
        ConfigError: A part is not a finite number, or two are the same.
    """
    alphas: list[float] = []
    problems: list[str] = []
    for part in text.split(","):
        try:
            alpha = _parse_alpha(part.strip())
        except ValueError as exc:
            problems.append(str(exc))
            continue
        if alpha in alphas:
            problems.append(f"{part.strip()} is given twice")
        alphas.append(alpha)
    if problems:
        raise ConfigError(
            f"alphas {text!r} can't be used",
            problems=problems,
            fix="give different finite numbers separated by commas, such as 0,0.5,1",
        )
    return tuple(alphas)


def _parse_alpha(part: str) -> float:
    if not part:
        msg = "a number is missing"
        raise ValueError(msg)
    try:
        alpha = float(part)
    except ValueError:
        msg = f"{part!r} is not a number"
        raise ValueError(msg) from None
    if problem := alpha_problem(alpha):
        msg = f"{part} {problem}"
        raise ValueError(msg)
    return alpha


def load_config(path: Path | None, overrides: Mapping[str, object]) -> ServeConfig:
    """Read the YAML file, lay the command line's values over it, and check the whole once.

    Args:
        path: The YAML file, or None for the command line alone. A relative `model`, `vector` or
            path under `vectors` that exists beside it is taken from there.
        overrides: Values by the names that YAML uses; None means not given.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: The file can't be read, or some values are wrong; all problems at once.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    values = {} if path is None else _resolved(read_settings(path), path.parent)
    if given.keys() & {"vector", "vectors"}:
        values = {key: value for key, value in values.items() if key not in {"vector", "vectors"}}
    merged = {**values, **given}
    problems: list[str] = []
    try:
        config = ServeConfig.model_validate(merged)
    except ValidationError as exc:
        problems = problems_of(exc, ServeConfig, given)
    if problems := [*problems, *_vector_problems(merged)]:
        raise ConfigError(
            f"the configuration {path} can't be used" if path else "the options can't be used",
            problems=problems,
            path=path,
        )
    return config


def _vector_problems(values: Mapping[str, object]) -> Iterator[str]:
    there = [name for name in ("vector", "vectors") if values.get(name) is not None]
    if not there:
        yield "`vector` is missing"
    elif len(there) > 1:
        yield "`vector` and `vectors` are both there; give one of them"


def _resolved(values: dict[str, object], folder: Path) -> dict[str, object]:
    """Take relative paths from the file's folder, where they exist; else they are Hub ids."""
    found = dict(values)
    for name in ("model", "vector"):
        if name in values:
            found[name] = beside(values[name], folder)
    if "vectors" in values:
        found["vectors"] = vectors_beside(values["vectors"], folder)
    return found
