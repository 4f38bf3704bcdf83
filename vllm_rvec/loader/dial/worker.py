"""vLLM's worker of this platform, with a model runner that knows alphas: `--worker-cls`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from vllm_rvec.errors import ConfigError
from vllm_rvec.loader.config import LoaderConfig
from vllm_rvec.loader.dial.runner import DialRunner
from vllm_rvec.loader.dial.vllm_workers import PlatformRunner, PlatformWorker

if TYPE_CHECKING:
    from vllm_rvec.loader.dial.layers import Batch
    from vllm_rvec.loader.vllm_api import VllmConfig

__all__ = ["DialModelRunner", "DialWorker"]

logger = logging.getLogger("vllm.rvec")

REHEARSED_TOKENS = 5
"""Not the number of anything else in a model."""


class DialModelRunner(DialRunner, PlatformRunner):  # type: ignore[misc]  # vLLM is untyped here
    """vLLM's model runner of this platform, which tells modules the alphas of its batch."""


class DialWorker(PlatformWorker):  # type: ignore[misc]  # as above
    """vLLM's worker of this platform."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        # The loader, which sees the configuration only, asks whether it has this worker.
        vllm_config.parallel_config.rvec_dial_worker = True
        # vLLM finds compiled graphs again by its configuration; those of a plain engine have no v.
        vllm_config.additional_config = {
            **(vllm_config.additional_config or {}),
            "vllm_rvec": "dial",
        }
        super().__init__(vllm_config, *args, **kwargs)

    def init_device(self) -> None:
        """Make vLLM's runner, and have it know alphas."""
        super().init_device()
        if type(self.model_runner) is not PlatformRunner:
            raise ConfigError(
                f"the dial can't work with the model runner {type(self.model_runner).__name__}",
                fix="set VLLM_USE_V2_MODEL_RUNNER=0 in the environment",
            )
        # vLLM's workers name their runner's class themselves. It is a subclass with the same
        # fields, made a moment ago.
        self.model_runner.__class__ = DialModelRunner

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load, and have the runner tell the modules what each step has."""
        super().load_model(*args, **kwargs)
        runner: Any = self.model_runner
        batch: Batch = runner.get_model().rvec_batch
        config, _ = LoaderConfig.split(self.vllm_config.load_config.model_loader_extra_config)
        runner.rvec_attach(batch, config.dial, config.default_alphas)
        if runner.device.type == "cuda":
            batch.static_alphas = torch.zeros(
                (runner.max_num_tokens, batch.vectors), dtype=torch.float32, device=runner.device
            )

    def determine_available_memory(self) -> int:
        """Measure with v taking part in every token, and see that it does take part."""
        runner: Any = self.model_runner
        runner.rvec_rehearsing = True
        try:
            available: int = super().determine_available_memory()
        finally:
            runner.rvec_rehearsing = False
        refuse_idle_modules(runner.rvec_rehearse(REHEARSED_TOKENS), runner.get_model())
        return available


def refuse_idle_modules(called: dict[str, set[int]], model: torch.nn.Module) -> None:
    """Refuse a model that does not use a module as one module is used for each token.

    Args:
        called: By module: the numbers of rows that it was given in a step of `REHEARSED_TOKENS`.
        model: Ready, with v beside its modules.

    Raises:
        ConfigError: A module never took part, since its weights are used in another way, or it was
            given something else than a row for each token.
    """
    batch: Batch = model.rvec_batch  # type: ignore[assignment]  # the loader put it there
    problems = [
        f"{name}: the model does not run it as a module"
        for name in batch.names
        if name not in called
    ]
    # As many as there are tokens, or as a padded step has: the same for all modules.
    fit = {REHEARSED_TOKENS, min((min(rows) for rows in called.values()), default=0)}
    problems += [
        f"{name}: it is given {sorted(rows)} rows for {REHEARSED_TOKENS} tokens"
        for name, rows in called.items()
        if not rows <= fit or min(rows) < REHEARSED_TOKENS
    ]
    if problems:
        raise ConfigError(
            "the vector changes modules that this model does not run token by token",
            problems=sorted(problems),
            why="their part at a request's alpha would be lost",
            fix="use --mode fused",
        )
