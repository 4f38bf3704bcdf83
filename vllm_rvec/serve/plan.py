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

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from vllm_rvec.serve.config import ServeConfig

__all__ = ["EngineSpec", "Variant", "plan_engines"]

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
OWNED_OPTIONS = frozenset({"vector", "vectors", "alpha", "vocabulary", "force"})
"""The loader's keys that `serve` sets, so that what was checked is what is loaded."""

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
        alpha: The vectors' scaling coefficient.
    """

    name: str
    alpha: float


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One vLLM process to be: what it answers for, and how it is started.

    Attributes:
        name: The engine's name in logs and on the console.
        variants: What it answers for; one each today.
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
        """The same engine at another alpha.

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
    environ: Mapping[str, str] | None = None,
) -> tuple[EngineSpec, ...]:
    """Plan one engine for each variant.

    Args:
        config: The checked configuration.
        extra_args: More flags for vLLM, as typed after `--`; they win over the configuration's.
        environ: The environment to build on; this process's own when None.

    Returns:
        The engines in the order in which they start.

    Raises:
        ConfigError: A flag is ours to give, or can't be understood; all problems at once.
    """
    configured = list(_as_arguments(config.engine_flags))
    _refuse_owned(configured, extra_args)
    options, flags = _take_loader_options([*configured, *extra_args])
    # Unbuffered: a line of log matters most just before its process dies.
    env = {"PYTHONUNBUFFERED": "1", **(os.environ if environ is None else environ), **config.env}
    for key in (CLIENT_KEY_VARIABLE, ADMIN_KEY_VARIABLE):
        env.pop(key, None)  # engines have keys of their own, and no use for these
    if config.admin_key is not None:
        env[PLUGINS_VARIABLE] = _plugins(env.get(PLUGINS_VARIABLE))
    flags = [*_default_flags(config, flags, env), *flags]
    return tuple(
        _engine(config, Variant(name, variant.alpha), options, flags, env)
        for name, variant in config.variants.items()
    )


def _plugins(given: str | None) -> str:
    """Have vLLM load the plugin that changes alpha, and all that it would load without us."""
    if given is not None:
        return ",".join(dict.fromkeys([*given.split(","), ADMIN_PLUGIN]))
    names = {plugin.name for group in PLUGIN_GROUPS for plugin in entry_points(group=group)}
    return ",".join([*sorted(names), ADMIN_PLUGIN])


def _engine(
    config: ServeConfig,
    variant: Variant,
    options: Mapping[str, object],
    flags: Sequence[str],
    env: Mapping[str, str],
) -> EngineSpec:
    loader_options = {
        **_loaded_vectors(config),
        "alpha": variant.alpha,
        "vocabulary": config.vocabulary,
        "force": config.force,
        **options,
    }
    argv = (
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", config.model),
        *("--served-model-name", variant.name),
        *("--load-format", "rvec"),
        *(f"--{LOADER_OPTIONS}", json.dumps(loader_options)),
        *flags,
    )
    key = secrets.token_urlsafe(32)
    return EngineSpec(variant.name, (variant,), argv, {**env, ENGINE_KEY_VARIABLE: key})


def _loaded_vectors(config: ServeConfig) -> dict[str, object]:
    if config.vectors is None:
        return {"vector": config.vector}
    return {"vectors": [v.model_dump(exclude_defaults=True) for v in config.vectors]}


def _default_flags(
    config: ServeConfig, flags: Sequence[str], env: Mapping[str, str]
) -> Iterator[str]:
    given = set(_flag_names(flags))
    if "shutdown-timeout" not in given:
        # Without it vLLM aborts the requests in flight as soon as it gets SIGTERM.
        yield from ("--shutdown-timeout", str(config.drain_seconds))
    if config.admin_key is not None and WORKER_FLAG not in given:
        yield from (f"--{WORKER_FLAG}", WORKER)
    engines = len(config.variants)
    if engines > 1 and not given & MEMORY_FLAGS and MEMORY_VARIABLE not in env:
        # Down, not to nearest: the shares must not add up to more than the whole.
        share = int(MEMORY_SHARE * 1000) // engines / 1000
        yield from ("--gpu-memory-utilization", f"{share:g}")


def _as_arguments(flags: Mapping[str, object]) -> Iterator[str]:
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


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _flag_name(argument: str) -> str:
    """`--Name_of.key=value` -> `Name-of`; empty for what is not a flag with two dashes."""
    if not argument.startswith("--"):
        return ""
    return argument[2:].split("=", 1)[0].split(".", 1)[0].replace("_", "-")


def _flag_names(arguments: Sequence[str]) -> Iterator[str]:
    return filter(None, map(_flag_name, arguments))


def _refuse_owned(configured: Sequence[str], extra_args: Sequence[str]) -> None:
    problems = [
        f"--{name} ({origin}): {OWNED_FLAGS[owned]}"
        for origin, arguments in (("under `engine`", configured), ("after `--`", extra_args))
        for name in _flag_names(arguments)
        if (owned := _owned_by_us(name)) is not None
    ]
    if extra_args and not extra_args[0].startswith("-"):
        # vLLM would take it for the model.
        problems.append(f"{extra_args[0]!r} (after `--`): a flag of vLLM begins with a dash")
    if problems:
        raise ConfigError("some of vLLM's flags are not yours to give here", problems=problems)


def _owned_by_us(name: str) -> str | None:
    """Find the flag that `name` stands for: argparse also takes any unambiguous beginning."""
    return next((owned for owned in OWNED_FLAGS if owned.startswith(name)), None)


def _take_loader_options(arguments: Sequence[str]) -> tuple[dict[str, object], list[str]]:
    """Part the loader's own options, which are merged with ours, from the other flags."""
    options: dict[str, object] = {}
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        name = _flag_name(word)
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
