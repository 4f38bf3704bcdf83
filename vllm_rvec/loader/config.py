"""What a user may write in `--model-loader-extra-config` for `--load-format rvec`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_rvec.errors import ConfigError
from vllm_rvec.vector.alpha import alpha_problem

__all__ = ["VLLM_KEYS", "LoaderConfig"]

VLLM_KEYS = ("enable_multithread_load", "num_threads", "enable_weights_track")
"""Keys of vLLM's own safetensors loader, handed on unchanged."""


class LoaderConfig(BaseModel):
    """The loader's own keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    vector: str = Field(min_length=1)
    """The stored vector: its folder, Hub id or URL."""
    alpha: float = 1.0
    """Scaling coefficient of the vector; 0 serves the target unchanged."""
    vocabulary: Literal["strict", "common", "skip-embeddings"] = "strict"
    """What to do where vector and target have different numbers of embedding rows: refuse, add the
    rows of both, or leave embedding and output head as they are."""
    force: bool = False
    """Go on where the check refuses: log it, and leave unfused what does not fit."""

    @field_validator("alpha")
    @classmethod
    def _check_alpha(cls, alpha: float) -> float:
        if problem := alpha_problem(alpha):
            raise ValueError(problem)
        return alpha

    @classmethod
    def split(cls, extra: object) -> tuple[LoaderConfig, dict[str, Any]]:
        """Take our keys out of vLLM's extra configuration.

        Args:
            extra: `model_loader_extra_config`, as vLLM hands it over.

        Returns:
            Our configuration, and the keys that are vLLM's.

        Raises:
            ConfigError: No mapping, an unknown key, a missing vector, an alpha that is no finite
                number: all of them at once.
        """
        if not isinstance(extra, dict):
            raise ConfigError("--model-loader-extra-config must be a JSON object", fix=_EXAMPLE)
        ours = {key: value for key, value in extra.items() if key not in VLLM_KEYS}
        try:
            config = cls.model_validate(ours)
        except ValidationError as exc:
            known = ", ".join((*cls.model_fields, *VLLM_KEYS))
            raise ConfigError(
                "--model-loader-extra-config is not right for --load-format rvec",
                problems=[_problem(error["loc"], error["msg"]) for error in exc.errors()],
                why=f"the keys are: {known}",
                fix=_EXAMPLE,
            ) from exc
        return config, {key: value for key, value in extra.items() if key in VLLM_KEYS}


_EXAMPLE = """for example --model-loader-extra-config '{"vector": "DIR", "alpha": 0.5}'"""


def _problem(location: tuple[int | str, ...], message: str) -> str:
    key = ".".join(map(str, location))
    if message == "Extra inputs are not permitted":
        return f"unknown key {key!r}"
    if message == "Field required":
        return f"key {key!r} is missing"
    return f"{key}: {message}"
