"""What people write to sweep: the YAML file, and the flags that override it.

Not here: what becomes of it. `arms` says what is asked, `asking` asks it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from vllm_rvec.errors import ConfigError
from vllm_rvec.evaluation.alphas import Alphas
from vllm_rvec.evaluation.records import ArmKind
from vllm_rvec.evaluation.tasks import TaskSpec
from vllm_rvec.vector.compatibility.structure import Vocabulary
from vllm_rvec.vector.dial_settings import refuse_bool
from vllm_rvec.vector.settings_file import beside, check_address, problems_of, read_settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["KEY_VARIABLE", "SweepConfig", "load_sweep_config"]

KEY_VARIABLE = "VLLM_RVEC_API_KEY"
"""Where the key is looked for that an address asks for, unless another variable is named."""


def _as_spec(value: object) -> object:
    """Take a path for a task that says nothing else."""
    return {"path": value} if isinstance(value, str) else value


Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, BeforeValidator(refuse_bool), Field(ge=0)]
Positive = Annotated[int, BeforeValidator(refuse_bool), Field(ge=1)]
Seed = Annotated[int, BeforeValidator(refuse_bool), Field(ge=0, lt=2**63)]


class SweepConfig(BaseModel):
    """Everything that `vllm-rvec sweep` can be told."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True
    )

    model: Text | None = None
    """The target: a local folder or a Hub id. With an `endpoint` that says nothing of alpha, the
    served name that is taken for the target as it is."""

    vector: Text | None = None
    """The stored vector: its folder, Hub id or URL."""

    alphas: Alphas = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    """How much of the vector is added: a list, or `-1:1.5:0.25`. 0 and -1 are arms anyway."""

    prompt_alphas: Alphas | None = None
    """At which of them the thinking prompt is tried too; without any, at those above 0."""

    random_alphas: Alphas = (1.0,)
    """How much of the random vector is added."""

    arms: Annotated[tuple[ArmKind, ...], Field(min_length=1)] = tuple(ArmKind)
    """Kinds of arms: all of them, unless some are named. `base` is always one."""

    tasks: Annotated[
        tuple[Annotated[TaskSpec, BeforeValidator(_as_spec)], ...], Field(min_length=1)
    ]
    """What is asked. A plain path is a task that says nothing else."""

    limit: Positive | None = None
    """How many problems of each task are asked; a larger limit later only adds some."""

    endpoint: Annotated[str, AfterValidator(check_address)] | None = None
    """Where variants are served already; without it, an engine is started for the sweep."""

    api_key_env: Text = KEY_VARIABLE
    """The environment variable that holds the key which the endpoint asks for."""

    mode: Literal["auto", "dial", "live"] = "auto"
    """How an engine of our own comes to each alpha: dial, all arms in one batch; or live, a fused
    engine that reloads its weights between them. auto takes the dial unless something rules it
    out."""

    vocabulary: Vocabulary = "strict"
    """As for `serve`: what to do where target and vector have different numbers of rows."""

    force: bool = False
    """Go on where the check of vector and target refuses."""

    engine_flags: dict[str, JsonValue] = Field(default_factory=dict, alias="engine")
    """vLLM's flags for an engine of our own, as under `engine` for `serve`."""

    engine_words: tuple[str, ...] = ()
    """More of them, as they are typed after `--`."""

    env: dict[str, Annotated[str, Field(coerce_numbers_to_str=True)]] = Field(
        default_factory=dict, repr=False, exclude=True
    )
    """Environment variables for an engine of our own; may hold secrets, and is not written down."""

    seed: Seed = 0
    """Of the halves, of the order in which problems are asked, and of each request's sampling."""

    random_seed: Seed = 0
    """Of the random vector."""

    temperature: Annotated[float, BeforeValidator(refuse_bool), Field(ge=0, le=2)] = 0.0
    """Of the sampling; 0 is greedy."""

    max_concurrency: Annotated[Positive, Field(le=4096)] = 32
    """How many requests are under way at a time."""

    retries: Annotated[Count, Field(le=100)] = 8
    """How often a request is repeated that failed; the wait doubles, up to 30 s."""

    timeout_seconds: Annotated[
        float, BeforeValidator(refuse_bool), Field(gt=0, allow_inf_nan=False)
    ] = 600.0
    """How long one answer may take."""

    output: Text = "sweep-results"
    """The folder for answers and report. A sweep that finds its own there goes on with it."""

    confirm: bool = True
    """Half of the problems choose the alpha, the other half confirm it."""

    allow_code: bool = False
    """Run what models write, for tasks that are graded by unit tests."""

    @model_validator(mode="after")
    def _check_together(self) -> SweepConfig:
        if problems := list(self._problems()):
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        names = [task.called for task in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            yield f"two tasks are called {', '.join(twice)}; give one of them a `name` of its own"
        if ArmKind.BASE not in self.arms:
            yield "`arms` lacks `base`, which all others are compared with"
        if self.endpoint is None:
            yield from (
                f"`{name}` is missing, and there is no `endpoint`"
                for name in ("model", "vector")
                if getattr(self, name) is None
            )
        if self.engine_words and not self.engine_words[0].startswith("-"):
            yield f"{self.engine_words[0]!r} belongs to no flag: each task has a --task of its own"
        elif self.engine_words and self.endpoint is not None:
            yield "what stands after -- is for an engine of our own, and there is an `endpoint`"

    @property
    def prompted_alphas(self) -> tuple[float, ...]:
        """The alphas of the arms with vector and prompt."""
        given = self.alphas if self.prompt_alphas is None else self.prompt_alphas
        return tuple(a for a in given if a > 0 or (a and self.prompt_alphas is not None))

    @property
    def folder(self) -> Path:
        """Where answers and report go."""
        return Path(self.output)

    def api_key(self) -> str | None:
        """The endpoint's key; None where it needs none.

        Raises:
            ConfigError: The variable that was named is not set, or holds no key.
        """
        key = os.environ.get(self.api_key_env)
        if not key:
            if "api_key_env" not in self.model_fields_set:
                return None
            raise ConfigError(
                f"{self.api_key_env} is not set, which holds the endpoint's key",
                fix="set it, or leave `api_key_env` out",
            )
        if not key.isprintable() or not key.isascii():
            raise ConfigError(
                f"{self.api_key_env} holds something else than one line of plain text",
                fix="set it to the key alone, without a line break at its end",
            )
        return key


def load_sweep_config(path: Path | None, overrides: Mapping[str, object]) -> SweepConfig:
    """Read the YAML file, lay the command line's values over it, and check the whole once.

    Args:
        path: The file, or None for the command line alone. Relative paths in it are taken from its
            folder; of `model`, `vector` and tasks only where they exist there, else they are ids.
        overrides: Values by the names that YAML uses; None means not given.

    Raises:
        ConfigError: The file can't be read, or some values are wrong; all problems at once.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    values = {} if path is None else _resolved(read_settings(path), path.parent)
    try:
        return SweepConfig.model_validate({**values, **given})
    except ValidationError as exc:
        raise ConfigError(
            f"the configuration {path} can't be used" if path else "the options can't be used",
            problems=problems_of(exc, SweepConfig, given),
            path=path,
        ) from exc


def _resolved(values: dict[str, object], folder: Path) -> dict[str, object]:
    found = dict(values)
    for name in ("model", "vector"):
        if name in values:
            found[name] = beside(values[name], folder)
    if isinstance(tasks := values.get("tasks"), list):
        found["tasks"] = [_task_beside(task, folder) for task in tasks]
    if isinstance(output := values.get("output"), str) and output:
        found["output"] = str((folder / output).absolute())
    return found


def _task_beside(task: object, folder: Path) -> object:
    """Take a task's files, and those of its examples, from the folder."""
    if not isinstance(task, dict):
        return beside(task, folder)
    found = {**task, **({"path": beside(task["path"], folder)} if "path" in task else {})}
    if isinstance(shots := task.get("few_shot"), dict):
        found["few_shot"] = _task_beside(shots, folder)
    return found
