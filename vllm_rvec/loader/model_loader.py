"""`--load-format rvec`: vLLM's own safetensors loader, with a vector added to its weight stream.

The sum enters in `get_all_weights`, which vLLM calls at load, at `reload_weights` and at the wake
from level-2 sleep: always from the stored target, so nothing drifts and nothing is lost.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_rvec.errors import ERROR_MARKER, IncompatibleVectorError, RvecError
from vllm_rvec.loader.config import LoaderConfig
from vllm_rvec.loader.stream import FusedStream
from vllm_rvec.loader.vllm_api import DefaultModelLoader
from vllm_rvec.vector.compatibility import check_architecture
from vllm_rvec.vector.reader import VectorReader
from vllm_rvec.vector.verification import verify_finite

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    import torch

    from vllm_rvec.loader.vllm_api import LoadConfig, ModelConfig

__all__ = ["RvecModelLoader"]

# vLLM gives handlers to loggers under its own name only; others vanish in engine processes.
logger = logging.getLogger("vllm.rvec")


class RvecModelLoader(DefaultModelLoader):  # type: ignore[misc]  # vLLM is untyped here
    """Loads a safetensors checkpoint as theta + alpha * v.

    Args:
        load_config: vLLM's, with `vector` and `alpha` in `model_loader_extra_config`.

    Raises:
        ConfigError: The extra configuration is wrong; all problems at once.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        with _logged_errors():
            self.config, vllm_keys = LoaderConfig.split(load_config.model_loader_extra_config)
        base_config = dataclasses.replace(
            load_config, load_format="safetensors", model_loader_extra_config=vllm_keys
        )
        super().__init__(base_config)
        self.stream: FusedStream | None = None

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Fill a model's parameters with fused weights.

        Raises:
            RvecError: The vector can't be read or does not belong to this target.
        """
        super().load_weights(model, model_config)
        if self.stream is not None and not self.stream.is_complete:
            with _logged_errors():
                raise IncompatibleVectorError(
                    f"{model_config.model} was not read to its end",
                    why=f"the model class {type(model).__name__} left tensors unread, so it is "
                    "not known whether the vector covers them",
                    fix="report this model with its config.json",
                )

    def get_all_weights(
        self, model_config: ModelConfig, model: torch.nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Stream the target's tensors, each fused with its part of the vector.

        Raises:
            RvecError: The vector can't be read or does not belong to this target.
        """
        weights = super().get_all_weights(model_config, model)
        if getattr(model_config, "runner_type", None) == "draft":
            # A speculative draft is another checkpoint: the vector is not its own.
            yield from weights
            return
        with _logged_errors():
            self.stream = self._open_stream(model_config)
            started = time.perf_counter()
            yield from self.stream.fuse(weights)
            self._log_summary(self.stream, time.perf_counter() - started)

    def _open_stream(self, model_config: ModelConfig) -> FusedStream:
        vector = VectorReader(Path(self.config.vector))
        hf_config = model_config.hf_config
        check_architecture(vector.manifest, _facts(hf_config), target=model_config.model)
        logger.info("Checking that %s holds finite numbers only (once per vector)", vector.folder)
        verify_finite(vector)
        return FusedStream(
            vector=vector,
            alpha=self.config.alpha,
            dtype=model_config.dtype,
            target=model_config.model,
        )

    def _log_summary(self, stream: FusedStream, seconds: float) -> None:
        if stream.alpha == 0:
            logger.info("Loaded %s unchanged: alpha is 0", stream.target)
            return
        ledger = stream.ledger
        logger.info(
            "Fused %s with %s at alpha %s: %d copies, %d elements, %.2f s; computed early: %s",
            stream.target,
            stream.vector.folder,
            stream.alpha,
            ledger.copies,
            ledger.elements,
            seconds,
            dict(ledger.materialized) or "none",
        )


def _facts(hf_config: Any) -> dict[str, object]:
    return {"model_type": hf_config.model_type, "architectures": hf_config.architectures}


@contextmanager
def _logged_errors() -> Iterator[None]:
    """Log an error of ours in one place of the engine's log before vLLM wraps it in tracebacks."""
    try:
        yield
    except RvecError as exc:
        logger.error("%s%s: %s", ERROR_MARKER, type(exc).__name__, exc)  # noqa: TRY400 - the traceback follows, from vLLM
        raise
