"""What people write about traffic: names, splits, keys, limits. One schema for `route` and `serve`.

`serve` takes a `Routing` under its key `routing`, and knows its engines itself; `route` takes a
`RouteConfig`, which also says where the engines are. Not here: what becomes of it (`policy`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
)

from vllm_rvec.errors import ConfigError
from vllm_rvec.router.keyring import KeyConfig, Keyring
from vllm_rvec.router.results.store import ResultsConfig
from vllm_rvec.router.settings import PathText, Settings
from vllm_rvec.router.shadow import ShadowConfig
from vllm_rvec.router.upstreams import Upstream
from vllm_rvec.vector.dial import DEFAULT_RANGE, Dial
from vllm_rvec.vector.dial_settings import Range, VariantAlpha, alphas_of
from vllm_rvec.vector.settings_file import check_address, problems_of, read_settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = [
    "AliasConfig",
    "DialConfig",
    "HealthConfig",
    "RouteConfig",
    "RoutedVariant",
    "Routing",
    "TlsConfig",
    "UpstreamConfig",
    "VariantPolicy",
    "Weight",
    "check_weights",
    "is_name",
    "load_route_config",
    "load_routing",
]


def is_name(name: str) -> bool:
    """Whether this can be a name: it goes into headers, labels and lists."""
    return name.isascii() and name.isprintable() and not {",", " "} & set(name) and bool(name)


def _check_name(name: str) -> str:
    if not is_name(name):
        msg = "a name is printable ASCII text without spaces or commas"
        raise ValueError(msg)
    return name


def check_weights(weights: dict[str, float]) -> dict[str, float]:
    """Let relative weights through that choose somebody; for pydantic."""
    if not any(weight > 0 for weight in weights.values()):
        msg = "one weight at least must be above 0"
        raise ValueError(msg)
    return weights


def _as_alias(value: object) -> object:
    """Take `default: base` for an alias that is just another name."""
    return {"split": {value: 1.0}} if isinstance(value, str) else value


Name = Annotated[str, AfterValidator(_check_name)]
Weight = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class UpstreamConfig(Settings):
    """An engine that runs elsewhere."""

    url: Annotated[str, AfterValidator(check_address)]
    """Where it answers: `http://10.0.0.7:8000`."""

    api_key_env: Annotated[str, Field(min_length=1)] | None = None
    """The environment variable that holds the key which the engine asks for."""

    def upstream(self) -> Upstream:
        """The engine as the router sees it.

        Raises:
            ConfigError: The variable is not set.
        """
        if self.api_key_env is None:
            return Upstream(self.url, None)
        if not (key := os.environ.get(self.api_key_env)):
            raise ConfigError(
                f"{self.api_key_env} is not set, which holds the key of {self.url}",
                fix="set it, or leave `api_key_env` out",
            )
        if not key.isprintable():  # most often a line break: no header could be made of it
            raise ConfigError(
                f"{self.api_key_env}, the key of {self.url}, holds more than one line of text",
                fix="set it to the key alone, without a line break at its end",
            )
        return Upstream(self.url, key)


class VariantPolicy(Settings):
    """How a variant's requests are handled."""

    max_in_flight: Annotated[int, Field(ge=1)] | None = None
    """How many requests it may have under way; more get a 503 with Retry-After."""

    fallback: Name | None = None
    """The variant that answers while this one can't. Answers then carry the reason `fallback`."""


class RoutedVariant(VariantPolicy):
    """A variant whose engines run elsewhere."""

    alpha: VariantAlpha | None = None
    """The vector's scaling coefficient; of a dial with several vectors, one for each by name."""

    vector: str | None = None
    """The stored vector, for `/v1/models`."""

    fingerprint: str | None = None
    """Which weights these are (`system_fingerprint`, a digest), for `/v1/models`."""

    upstreams: Annotated[list[UpstreamConfig], Field(min_length=1)] | None = None
    """The engines that answer for it. Without them it is one of the dial's."""


class DialConfig(Settings):
    """Engines that answer any alpha, each request's own."""

    upstreams: Annotated[list[UpstreamConfig], Field(min_length=1)]
    """Where they answer."""

    vectors: Annotated[list[Name], Field(min_length=1)] = Field(default_factory=lambda: ["vector"])
    """The vectors' names, in the engines' order."""

    alpha_range: Range = DEFAULT_RANGE
    """Between which alphas requests may choose, as `-1:2`."""


class AliasConfig(Settings):
    """A name that stands for variants."""

    split: Annotated[dict[Name, Weight], Field(min_length=1), AfterValidator(check_weights)]
    """Relative weights: `{base: 90, enhanced@1: 10}`. Written as a plain name (`default: base`),
    the alias is just another name for it."""

    salt: str = ""
    """Changes who gets what: another salt deals the users anew."""

    shadow: ShadowConfig | None = None
    """A copy of its traffic for another variant."""

    @property
    def is_split(self) -> bool:
        """Whether it chooses among variants, rather than being another name of one."""
        return len(self.split) > 1


class HealthConfig(Settings):
    """How upstreams are watched."""

    interval_seconds: Seconds = 5.0
    """How often each is asked for its health; one that is down, each second at least."""

    timeout_seconds: Seconds = 5.0
    """What it gets to answer."""

    failures: Annotated[int, Field(ge=1)] = 3
    """After how many failed checks in a row it is skipped. A refused connection is enough."""


class TlsConfig(Settings):
    """Certificate and key, as PEM files."""

    certificate: PathText
    """The certificate, with its chain."""

    key: PathText
    """Its private key."""


class Routing(Settings):
    """Everything about traffic."""

    aliases: dict[
        Name,
        Annotated[
            AliasConfig, BeforeValidator(_as_alias, json_schema_input_type=AliasConfig | str)
        ],
    ] = Field(default_factory=dict)
    """Names that stand for variants."""

    keys: dict[Name, KeyConfig] = Field(default_factory=dict)
    """Who may ask, each with a key of its own (`vllm-rvec new-key`)."""

    admin_key_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 of the key for changing weights and alphas; or the key itself in
    VLLM_RVEC_ADMIN_KEY."""

    results: ResultsConfig | None = None
    """Where exposures and outcomes are kept; without it, nowhere."""

    access_log: PathText | None = None
    """A file for one JSON line a request; `-` for stderr."""

    health: HealthConfig = HealthConfig()
    """How upstreams are watched."""

    insecure: bool = False
    """Answer beyond this machine without any key."""

    tls: TlsConfig | None = None
    """Answer over HTTPS."""

    cors_origins: list[str] = Field(default_factory=list)
    """Web pages of these origins may ask from a browser; none by default."""

    variants: Mapping[Name, VariantPolicy] = Field(default_factory=dict)
    """How the requests of each variant are handled."""

    def problems(self, variants: Sequence[str], dial: Dial | None) -> Iterator[str]:
        """Tell what does not fit the variants that there are."""
        for alias in self.aliases:
            if alias in variants or (dial is not None and dial.of_model(alias) is not None):
                yield f"`aliases.{alias}`: a variant has this name"
        yield from self._key_problems()
        for name, policy in self.variants.items():
            if policy.fallback == name:
                yield f"`variants.{name}.fallback`: it can't stand in for itself"
        for where, name in self._named_variants():
            if name in variants or (dial is not None and dial.of_model(name) is not None):
                continue
            yield f"`{where}`: there is no variant {name}; there are {', '.join(variants)}"

    def _key_problems(self) -> Iterator[str]:
        try:
            Keyring(self.keys, None)
        except ConfigError as exc:
            yield f"`keys`: {exc.what}"
        for name, key in self.keys.items():
            if key.sha256.lower() == self.admin_key_sha256:
                yield f"`admin_key_sha256`: it is the key of {name}, who could change variants"

    def named_variants(self) -> frozenset[str]:
        """Every variant that is named somewhere."""
        return frozenset(variant for _, variant in self._named_variants())

    def _named_variants(self) -> Iterator[tuple[str, str]]:
        for name, alias in self.aliases.items():
            yield from ((f"aliases.{name}.split", variant) for variant in alias.split)
            if alias.shadow is not None:
                yield f"aliases.{name}.shadow.variant", alias.shadow.variant
        for name, policy in self.variants.items():
            yield "variants", name
            if policy.fallback is not None:
                yield f"variants.{name}.fallback", policy.fallback


class RouteConfig(Routing):
    """The router alone, for engines that run elsewhere."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """The address on which clients are answered."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """The port; 0 takes any free one."""

    drain_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    """How long requests under way may go on once the router has been told to stop."""

    variants: Annotated[Mapping[Name, RoutedVariant], Field(min_length=1)]
    """What answers."""

    dial: DialConfig | None = None
    """Engines that answer any alpha, for all variants that have no upstreams of their own."""

    def made_dial(self) -> Dial | None:
        """What the dial's engines answer to."""
        if self.dial is None:
            return None
        names = tuple(self.dial.vectors)
        alphas = {
            name: alphas_of(variant.alpha or 0.0, names)
            for name, variant in self.variants.items()
            if variant.upstreams is None
        }
        return Dial(names, alphas, self.dial.alpha_range)

    def all_problems(self) -> Iterator[str]:
        """Tell what does not fit together."""
        for name, variant in self.variants.items():
            if variant.upstreams is not None:
                if isinstance(variant.alpha, dict):
                    yield f"`variants.{name}.alpha`: one number, as its engine is not a dial"
            elif self.dial is None:
                yield f"`variants.{name}.upstreams` is missing, and there is no `dial`"
            elif variant.alpha is None:
                yield f"`variants.{name}.alpha` is missing, which the dial must be told"
            elif isinstance(variant.alpha, dict) and (
                unknown := variant.alpha.keys() - set(self.dial.vectors)
            ):
                yield f"`variants.{name}.alpha`: no vector is called {', '.join(sorted(unknown))}"
        yield from self._dial_problems()
        yield from self.problems(list(self.variants), self.made_dial())

    def _dial_problems(self) -> Iterator[str]:
        if self.dial is None:
            return
        if len({*self.dial.vectors}) < len(self.dial.vectors):
            yield "`dial.vectors`: one of them is there twice"
        if all(variant.upstreams is not None for variant in self.variants.values()):
            yield "`dial`: every variant has upstreams of its own, so that none is the dial's"


def load_route_config(path: Path, overrides: Mapping[str, object] | None = None) -> RouteConfig:
    """Read and check the file of `vllm-rvec route`.

    Args:
        path: YAML.
        overrides: From the command line; None means not given.

    Raises:
        ConfigError: It can't be read, or some values are wrong; all problems at once.
    """
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    values = {**read_settings(path), **given}
    try:
        config = RouteConfig.model_validate(values, context=path.parent)
        problems = list(config.all_problems())
    except ValidationError as exc:
        problems = problems_of(exc, RouteConfig)
    if problems:
        what = f"the configuration {path} can't be used"
        raise ConfigError(what, problems=problems, path=path)
    return config


def load_routing(
    values: Mapping[str, object], folder: Path, variants: Sequence[str], dial: Dial | None
) -> Routing:
    """Check what stands under `routing` in the file of `vllm-rvec serve`.

    Args:
        values: As read.
        folder: The file's, for relative paths.
        variants: The names of those that `serve` has.
        dial: What their one engine answers to, if there is a dial.

    Raises:
        ConfigError: Some values are wrong; all problems at once.
    """
    try:
        routing = Routing.model_validate(values, context=folder)
        problems = list(routing.problems(variants, dial))
    except ValidationError as exc:
        problems = problems_of(exc, Routing)
    if problems:
        raise ConfigError("`routing` can't be used", problems=[*map(_under_routing, problems)])
    return routing


def _under_routing(problem: str) -> str:
    return problem.replace("`", "`routing.", 1) if problem.startswith("`") else problem
