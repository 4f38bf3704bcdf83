"""From the configuration to the engines: which there are, with which command and environment.

Pure: nothing is started here, and vLLM is a list of words. Host and port are not in the plan; an
`EngineProcess` takes a free port each time that it starts.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from vllm_rvec.errors import ConfigError
from vllm_rvec.serve.config import (
    ADMIN_KEY_VARIABLE,
    CLIENT_KEY_VARIABLE,
    ENGINE_KEY_VARIABLE,
)
from vllm_rvec.serve.flags import as_arguments, flag_name, flag_names, stands_for, take_values
from vllm_rvec.vector.dial import vector_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from vllm_rvec.serve.config import ServeConfig
    from vllm_rvec.serve.mode import Mode

__all__ = ["DIAL_ENGINE", "DIAL_PARTS", "EngineSpec", "Variant", "plan_engines"]

MEMORY_SHARE = 0.9
"""What all engines together may take of the memory; vLLM's own default for one engine is 0.92."""

MEMORY_FLAGS = frozenset({"gpu-memory-utilization", "kv-cache-memory-bytes"})
MEMORY_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"

PLUGINS_VARIABLE = "VLLM_PLUGINS"
"""vLLM's list of the plugins that may load; where it is not set, all may but those that add paths
to its server."""
ADMIN_PLUGIN = "rvec_admin"
WORKER_FLAG = "worker-extension-cls"
WORKER = "vllm_rvec.loader.worker.RvecWorker"
"""What lets the plugin reach an engine's workers. A class of the user's own inherits from it."""
PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)
"""Those that load where no list is set."""

LOADER_OPTIONS = "model-loader-extra-config"
OWNED_OPTIONS = frozenset(
    {
        *("vector", "vectors", "alpha", "vocabulary", "force"),
        *("mode", "alpha_range", "variants", "vector_dtype"),
    }
)
"""The loader's keys that `serve` sets, so that what was checked is what is loaded."""

DIAL_ENGINE = "dial"
"""What the one engine of a dial is called."""
DIAL_PARTS = {
    "worker-cls": "vllm_rvec.loader.dial.worker.DialWorker",
    "scheduler-cls": "vllm_rvec.loader.dial.scheduler.DialScheduler",
}
"""Parts of vLLM that a dial replaces."""
DIAL_PROCESSOR = "vllm_rvec.loader.dial.admission:AlphaAdmission"
DIAL_MIDDLEWARE = "vllm_rvec.loader.dial.middleware.DialMiddleware"
DIAL_ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "0"}

QUIET_FLAG = "disable-access-log-for-endpoints"

PROCESSORS_FLAG = "logits-processors"
"""Takes several values, and only the last time that it is given counts."""
MIDDLEWARE_FLAG = "middleware"
"""Takes one value, and may be given again."""

_BESIDE_ENGINE = "engines answer on the loopback only; {} belongs to `vllm-rvec serve` itself"
OWNED_FLAGS = {
    "model": "set `model`",
    "served-model-name": "name the variants under `variants`",
    "load-format": "it is always rvec, which adds the vector",
    "host": _BESIDE_ENGINE.format("`host`"),
    "port": _BESIDE_ENGINE.format("`port`"),
    "uds": _BESIDE_ENGINE.format("`host`"),
    "api-key": "set `api_key`; each engine has a key of its own",
    "ssl-keyfile": "put TLS in front of `vllm-rvec serve`",
    "ssl-certfile": "put TLS in front of `vllm-rvec serve`",
    "config": "write its flags under `engine:` in the configuration",
}
"""Flags of vLLM that are ours to give, and what the user does instead."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A named alpha of the configuration's target and vectors, which answers.

    Attributes:
        name: What requests put in `model`.
        alpha: The vectors' scaling coefficient; of a dial also one for each vector, by name.
    """

    name: str
    alpha: float | Mapping[str, float]

    @property
    def alpha_text(self) -> str:
        """The alpha as people read it."""
        if isinstance(self.alpha, float | int):
            return f"{self.alpha:g}"
        return ", ".join(f"{name}={alpha:g}" for name, alpha in self.alpha.items())


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One vLLM process to be: what it answers for, and how it is started.

    Attributes:
        name: The engine's name in logs and on the console.
        variants: What it answers for: one where the vectors are fused, all of them with a dial.
        argv: Its command, without host and port.
        env: Its whole environment; holds the engine's API key and so is not shown.
    """

    name: str
    variants: tuple[Variant, ...]
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False, compare=False)

    @property
    def api_key(self) -> str:
        """The key that this engine asks for."""
        return self.env.get(ENGINE_KEY_VARIABLE, "")

    def with_alpha(self, alpha: float) -> EngineSpec:
        """The same engine at another alpha. Not a dial's, which needs nothing for that.

        Args:
            alpha: For its one variant.
        """
        (variant,) = self.variants
        at = self.argv.index(f"--{LOADER_OPTIONS}") + 1
        options = json.dumps(json.loads(self.argv[at]) | {"alpha": alpha})
        return replace(
            self,
            variants=(replace(variant, alpha=alpha),),
            argv=(*self.argv[:at], options, *self.argv[at + 1 :]),
        )


def plan_engines(
    config: ServeConfig,
    extra_args: Sequence[str] = (),
    *,
    mode: Mode = "fused",
    environ: Mapping[str, str] | None = None,
) -> tuple[EngineSpec, ...]:
    """Plan one engine for each variant, or one dial for them all.

    Args:
        config: The checked configuration.
        extra_args: More flags for vLLM, as typed after `--`; they win over the configuration's.
        mode: As `choose_mode` has it.
        environ: The environment to build on; this process's own when None.

    Returns:
        The engines in the order in which they start.

    Raises:
        ConfigError: A flag is ours to give, or can't be understood; all problems at once.
    """
    configured = list(as_arguments(config.engine_flags))
    _refuse_owned(configured, extra_args)
    options, flags = _take_loader_options([*configured, *extra_args])
    # Unbuffered: a line of log matters most just before its process dies.
    env = {"PYTHONUNBUFFERED": "1", **(os.environ if environ is None else environ), **config.env}
    for key in (CLIENT_KEY_VARIABLE, ADMIN_KEY_VARIABLE):
        env.pop(key, None)  # engines have keys of their own, and no use for these
    if mode == "dial":
        return (_dial_engine(config, options, flags, env),)
    if config.has_admin:
        env[PLUGINS_VARIABLE] = _plugins(env.get(PLUGINS_VARIABLE))
    flags = [*_default_flags(config, flags, env), *flags]
    return tuple(
        _fused_engine(config, Variant(name, variant.alpha), options, flags, env)
        for name, variant in config.variants.items()
    )


def _plugins(given: str | None) -> str:
    """Have vLLM load the plugin that changes alpha, and all that it would load without us."""
    if given is not None:
        return ",".join(dict.fromkeys([*given.split(","), ADMIN_PLUGIN]))
    names = {plugin.name for group in PLUGIN_GROUPS for plugin in entry_points(group=group)}
    return ",".join([*sorted(names), ADMIN_PLUGIN])


def _fused_engine(
    config: ServeConfig,
    variant: Variant,
    options: Mapping[str, object],
    flags: Sequence[str],
    env: Mapping[str, str],
) -> EngineSpec:
    loader_options = {
        **_fused_vectors(config),
        "alpha": variant.alpha,
        **_checks(config),
        **options,
    }
    argv = _command(config, _names_of(config, variant.name), loader_options, flags)
    return EngineSpec(variant.name, (variant,), argv, _with_key(env))


def _dial_engine(
    config: ServeConfig,
    options: Mapping[str, object],
    flags: Sequence[str],
    env: Mapping[str, str],
) -> EngineSpec:
    alphas = {name: variant.alpha for name, variant in config.variants.items()}
    loader_options = {
        **_dial_vectors(config),
        "mode": "dial",
        "alpha_range": list(config.dial.allowed),
        "variants": alphas,
        "vector_dtype": config.vector_dtype,
        **_checks(config),
        **options,
    }
    words = [*_server_flags(config, flags), *_dial_flags(flags)]
    argv = _command(config, [next(iter(alphas))], loader_options, words)
    variants = tuple(Variant(name, alpha) for name, alpha in alphas.items())
    return EngineSpec(DIAL_ENGINE, variants, argv, _with_key({**env, **DIAL_ENVIRONMENT}))


def _dial_flags(flags: Sequence[str]) -> Iterator[str]:
    """Put a dial's parts beside the user's flags; what both may give is joined."""
    processors, flags = take_values(flags, PROCESSORS_FLAG)
    middleware, flags = take_values(flags, MIDDLEWARE_FLAG)
    yield from flags
    for name, part in DIAL_PARTS.items():
        yield from (f"--{name}", part)
    yield from (f"--{PROCESSORS_FLAG}", *(processors or [[]])[-1], DIAL_PROCESSOR)
    # Ours last, which vLLM puts outermost: theirs see requests as the engine does.
    for part in [*(part for parts in middleware for part in parts), DIAL_MIDDLEWARE]:
        yield from (f"--{MIDDLEWARE_FLAG}", part)


def _command(
    config: ServeConfig,
    served_names: Sequence[str],
    options: Mapping[str, object],
    flags: Sequence[str],
) -> tuple[str, ...]:
    return (
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", config.model),
        *("--served-model-name", *served_names),
        *("--load-format", "rvec"),
        *(f"--{LOADER_OPTIONS}", json.dumps(options)),
        *flags,
    )


def _names_of(config: ServeConfig, variant: str) -> list[str]:
    """What a fused engine answers to: its variant's name, by which it calls itself, and the others.

    The router decides who gets a request, and passes the body on as it is: with an alias in it, or
    with the name of a variant whose fallback this is.
    """
    others = [*config.aliases, *(name for name in config.variants if name != variant)]
    return [variant, *others]


def _with_key(env: Mapping[str, str]) -> dict[str, str]:
    return {**env, ENGINE_KEY_VARIABLE: secrets.token_urlsafe(32)}


def _checks(config: ServeConfig) -> dict[str, object]:
    return {"vocabulary": config.vocabulary, "force": config.force}


def _fused_vectors(config: ServeConfig) -> dict[str, object]:
    if config.vectors is None:
        return {"vector": config.vector}
    said = [v.model_dump(exclude_defaults=True, exclude={"name"}) for v in config.vectors]
    return {"vectors": said}


def _dial_vectors(config: ServeConfig) -> dict[str, object]:
    """Name the vectors for the engine, unless it finds the same names itself."""
    names = vector_names(config.recipe)
    unnamed = [vector.model_copy(update={"name": None}) for vector in config.recipe]
    if config.vectors is None and names == vector_names(unnamed):
        return {"vector": config.vector}
    named = zip(unnamed, names, strict=True)
    said = [v.model_dump(exclude_defaults=True) | {"name": name} for v, name in named]
    return {"vectors": said}


def _default_flags(
    config: ServeConfig, flags: Sequence[str], env: Mapping[str, str]
) -> Iterator[str]:
    given = set(flag_names(flags))
    yield from _server_flags(config, flags)
    if config.has_admin and WORKER_FLAG not in given:
        yield from (f"--{WORKER_FLAG}", WORKER)
    engines = len(config.variants)
    if engines > 1 and not given & MEMORY_FLAGS and MEMORY_VARIABLE not in env:
        # Down, not to nearest: the shares must not add up to more than the whole.
        share = int(MEMORY_SHARE * 1000) // engines / 1000
        yield from ("--gpu-memory-utilization", f"{share:g}")


def _server_flags(config: ServeConfig, flags: Sequence[str]) -> Iterator[str]:
    given = set(flag_names(flags))
    if "shutdown-timeout" not in given:
        # Without it vLLM aborts the requests in flight as soon as it gets SIGTERM.
        yield from ("--shutdown-timeout", str(config.drain_seconds))
    if QUIET_FLAG not in given:
        # The router asks every few seconds.
        yield from (f"--{QUIET_FLAG}", "/health")


def _refuse_owned(configured: Sequence[str], extra_args: Sequence[str]) -> None:
    problems = [
        f"--{name} ({origin}): {OWNED_FLAGS[owned]}"
        for origin, arguments in (("under `engine`", configured), ("after `--`", extra_args))
        for name in flag_names(arguments)
        if (owned := stands_for(name, OWNED_FLAGS)) is not None
    ]
    if extra_args and not extra_args[0].startswith("-"):
        # vLLM would take it for the model.
        problems.append(f"{extra_args[0]!r} (after `--`): a flag of vLLM begins with a dash")
    if problems:
        raise ConfigError("some of vLLM's flags are not yours to give here", problems=problems)


def _take_loader_options(arguments: Sequence[str]) -> tuple[dict[str, object], list[str]]:
    """Part the loader's own options, which are merged with ours, from the other flags."""
    options: dict[str, object] = {}
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        name = flag_name(word)
        if not name or not LOADER_OPTIONS.startswith(name):
            rest.append(word)
            continue
        head, equals, text = word.partition("=")
        if name != LOADER_OPTIONS or "." in head:
            raise _loader_options_error(f"{head} is not understood here")
        options |= _parse_loader_options(text if equals else next(words, ""))
    return options, rest


def _parse_loader_options(text: str) -> dict[str, object]:
    try:
        options = json.loads(text)
    except ValueError as exc:
        raise _loader_options_error(f"not JSON: {exc}") from exc
    if not isinstance(options, dict):
        raise _loader_options_error("not a JSON object")
    if ours := OWNED_OPTIONS & options.keys():
        named = " and ".join(sorted(ours))
        raise _loader_options_error(f"{named}: a setting of `vllm-rvec serve` itself")
    return options


def _loader_options_error(why: str) -> ConfigError:
    return ConfigError(
        f"--{LOADER_OPTIONS} can't be used",
        why=why,
        fix=f"give one JSON object: --{LOADER_OPTIONS} '{{\"key\": value}}'",
    )
