"""Fused or dial: which kind of engine a configuration gets, and why.

A fused engine's weights are theta + alpha * v, so it answers at one alpha. A dial engine keeps
theta and v apart and answers any, but not with every model and every flag of vLLM. `choose_mode`
decides from what is written and from `ModelFacts`; only `model_facts` opens files. Imports no
torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from vllm_rvec.checkpoint.table import is_folder, read_config
from vllm_rvec.errors import ConfigError
from vllm_rvec.serve.flags import as_arguments, flag_name, flag_value, stands_for
from vllm_rvec.vector.compatibility.dialable import dial_problem
from vllm_rvec.vector.fetching import locate_vector
from vllm_rvec.vector.reader import VectorReader
from vllm_rvec.vector.recipe import tensor_alphas

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from vllm_rvec.serve.config import ServeConfig

__all__ = ["Mode", "ModeChoice", "ModelFacts", "choose_mode", "model_facts"]

Mode = Literal["fused", "dial"]

_OWN_PART = "a dial engine has one of its own"
RULED_OUT: Final = {
    "pipeline-parallel-size": "a dial engine can't be split into stages",
    "data-parallel-size": "a dial engine has no replicas inside",
    "speculative-config": "a draft does not know the alphas of requests",
    "spec-method": "a draft does not know the alphas of requests",
    "spec-model": "a draft does not know the alphas of requests",
    "spec-tokens": "a draft does not know the alphas of requests",
    "data-parallel-rank": "a dial engine has no replicas inside",
    "data-parallel-size-local": "a dial engine has no replicas inside",
    "enable-prompt-embeds": "embeddings that a request brings have no alpha",
    "enable-sleep-mode": "a dial engine's vectors would not wake up again",
    "runner": "a dial engine generates; it has no alphas for pooling",
    "convert": "a dial engine generates; it has no alphas for pooling",
    "pooler-config": "a dial engine generates; it has no alphas for pooling",
    "enable-lora": "a dial engine's layers are its own, and take no adapters",
    "worker-cls": _OWN_PART,
    "scheduler-cls": _OWN_PART,
}
"""Flags of vLLM that a dial engine does not have."""
HARMLESS: Final = {
    "pipeline-parallel-size": {"1"},
    "data-parallel-size": {"1"},
    "data-parallel-size-local": {"1"},
    "runner": {"auto", "generate"},
    "convert": {"auto", "none"},
}
"""Values of theirs that ask for nothing."""
SHORT: Final = {
    "-pp": "pipeline-parallel-size",
    "-dp": "data-parallel-size",
    "-sc": "speculative-config",
}

NOT_AT_HAND: Final = "config.json of a Hub id is not at hand; --mode dial asks for it all the same"


@dataclass(frozen=True, slots=True)
class ModeChoice:
    """What kind of engine it is."""

    mode: Mode
    reason: str
    """For people: why, and what to do for the other one."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the files say that matters here."""

    config: Mapping[str, object] | None
    """The target's config.json; None for a Hub id, which vLLM fetches."""
    changed: frozenset[str]
    """Names of the tensors that some vector changes."""


def model_facts(config: ServeConfig) -> ModelFacts:
    """Read what the choice needs of target and vectors: no weights.

    Raises:
        CheckpointError: The target has no config.json that can be read.
        VectorFormatError: There is no vector, or it is not one.
        VectorCorruptError: Its shards don't hold what its manifest says.
        ConfigError: A recipe does not fit its vector.
    """
    target = Path(config.model)
    return ModelFacts(
        config=read_config(target) if is_folder(target) else None,
        changed=frozenset(_changed(config)),
    )


def choose_mode(
    config: ServeConfig, extra_args: Sequence[str] = (), facts: ModelFacts | None = None
) -> ModeChoice:
    """Choose between one engine for each variant and one for all.

    Args:
        config: The checked configuration.
        extra_args: More flags for vLLM, as typed after `--`.
        facts: What the files say; where None, they are taken to rule nothing out.

    Raises:
        ConfigError: What was asked for can't be had: a dial that something rules out, or settings
            of a dial for fused engines. All problems at once.
    """
    only_dial = list(_dial_settings(config))
    if config.mode == "fused":
        return _fused_as_asked(only_dial)
    flags = list(_flag_problems([*as_arguments(config.engine_flags), *extra_args]))
    model = _model_problem(facts)
    if config.mode == "dial" or only_dial:
        return _dial_as_asked(config, flags, model, only_dial)
    distinct = len(set(config.dial.variants.values()))
    if distinct == 1:
        reason = "there is one alpha; with --mode dial, requests could choose others"
        return ModeChoice("fused", reason)
    why = [*flags, *([model] if model else [])]
    if facts is not None and facts.config is None:
        why.append(NOT_AT_HAND)
    if why:
        return ModeChoice("fused", f"one engine for each alpha, for want of a dial: {_joined(why)}")
    return ModeChoice(
        "dial",
        f"one engine for {distinct} alphas and any other in {config.dial.allowed}; "
        "--mode fused starts one for each",
    )


def _fused_as_asked(only_dial: list[str]) -> ModeChoice:
    if only_dial:
        raise ConfigError(
            "fused engines can't do what only a dial does",
            problems=only_dial,
            why="a fused engine answers at one alpha, which multiplies all of its vectors",
            fix="leave these settings out, or use --mode dial",
        )
    return ModeChoice("fused", "as asked")


def _dial_as_asked(
    config: ServeConfig, flags: list[str], model: str, only_dial: list[str]
) -> ModeChoice:
    is_forced = bool(model) and config.force
    problems = [*flags, *([model] if model and not is_forced else [])]
    if problems:
        raise ConfigError(
            "a dial engine can't be used here",
            problems=problems,
            why="" if config.mode == "dial" else f"it is asked for by {', '.join(only_dial)}",
            fix=_way_out(flags, model if not is_forced else "", only_dial),
        )
    if is_forced:
        return ModeChoice("dial", f"forced, though {model}")
    return ModeChoice("dial", "as asked" if config.mode == "dial" else f"for {_joined(only_dial)}")


def _way_out(flags: list[str], model: str, only_dial: list[str]) -> str:
    ways = ["use --mode fused, one engine for each alpha"]
    if only_dial:
        ways[0] += ", without the settings that only a dial has"
    if flags:
        ways.append("leave these flags out" if not model else "leave the flags out")
    if model and flags:
        ways[-1] += " and try it with --force"
    elif model:
        ways.append("try it with --force")
    return ", or ".join(ways)


def _joined(parts: Iterable[str]) -> str:
    return "; ".join(parts)


def _dial_settings(config: ServeConfig) -> Iterator[str]:
    """Name the settings that mean nothing without a dial."""
    for name, variant in config.variants.items():
        if isinstance(variant.alpha, dict):
            yield f"`variants.{name}.alpha`, which is a mapping"
    if config.alpha_range is not None:
        yield "`alpha_range`"
    if config.vector_dtype != "auto":
        yield "`vector_dtype`"


def _flag_problems(arguments: Sequence[str]) -> Iterator[str]:
    for at, word in enumerate(arguments):
        short, _, _ = word.partition("=")
        flag = SHORT.get(short) or stands_for(flag_name(word), RULED_OUT)
        if flag is None or flag_value(arguments, at) in HARMLESS.get(flag, ()):
            continue
        yield f"--{flag}: {RULED_OUT[flag]}"


def _model_problem(facts: ModelFacts | None) -> str:
    if facts is None or facts.config is None:
        return ""
    return dial_problem(facts.config, facts.changed)


def _changed(config: ServeConfig) -> Iterator[str]:
    for said in config.recipe:
        manifest = VectorReader(locate_vector(said.path).folder).manifest
        names = {name for name, entry in manifest.tensors.items() if entry.encoding != "zero"}
        if config.is_recipe:
            alphas = tensor_alphas(said, manifest.tensors, is_complete=manifest.complete)
            names &= {name for name, alpha in alphas.items() if alpha}
        yield from names
