"""`--load-format rvec`: vLLM's own safetensors loader, with a vector added to its weight stream.

The sum enters in `get_all_weights`, which vLLM calls at load, at `reload_weights` and at the wake
from level-2 sleep: always from the stored target, so nothing drifts and nothing is lost.

Each load checks that the vector belongs to the target, also at alpha 0. It trusts the vector's
bytes: `serve` and `vllm-rvec verify` look at them once.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import try_to_load_from_cache

from vllm_rvec.checkpoint.remote import shown
from vllm_rvec.checkpoint.table import is_folder
from vllm_rvec.errors import ERROR_MARKER, RvecError
from vllm_rvec.loader.config import LoaderConfig
from vllm_rvec.loader.fetching import find_vector
from vllm_rvec.loader.stream import FusedStream
from vllm_rvec.loader.vllm_api import DefaultModelLoader
from vllm_rvec.vector.compatibility.report import Level, Report, Verdict, refused
from vllm_rvec.vector.compatibility.structure import (
    Pairing,
    architecture_findings,
    structure_level,
)
from vllm_rvec.vector.compatibility.tokenizer import TOKENIZER_NAME, tokenizer_level
from vllm_rvec.vector.reader import VectorReader

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
                unread = refused(
                    f"the model class {type(model).__name__} left tensors unread, so it is not "
                    "known whether the vector covers them"
                )
                self._judge(model_config, Level("structure", "not read to its end", (unread,)))

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
            seconds = time.perf_counter() - started
            tied = getattr(model_config.hf_config, "tie_word_embeddings", None)
            tensors = self.stream.findings(is_tied=tied)
            self._judge(model_config, structure_level((), tensors), self.stream.lineage())
            self._log_summary(model_config, self.stream, seconds)

    def _open_stream(self, model_config: ModelConfig) -> FusedStream:
        """Open the vector; check first what can be checked before any weight is read."""
        vector = VectorReader(find_vector(self.config.vector).folder)
        hf_config = model_config.hf_config
        facts = {"model_type": hf_config.model_type, "architectures": hf_config.architectures}
        self._judge(
            model_config,
            structure_level(architecture_findings(vector.manifest, facts), ()),
            tokenizer_level(vector.manifest.tokenizer, _tokenizer_file(model_config)),
        )
        return FusedStream(
            vector=vector,
            pairing=Pairing(vector.manifest, self.config.vocabulary),
            alpha=self.config.alpha,
            dtype=model_config.dtype,
        )

    def _judge(self, model_config: ModelConfig, *levels: Level) -> None:
        """Log what the check warns of, and raise or log what it refuses."""
        report = Report(shown(self.config.vector), model_config.model, levels)
        report.raise_if_refused(self.config.force)
        for line in report.lines(Verdict.WARN):
            logger.warning("Vector and target: %s", line)
        for line in report.lines(Verdict.REFUSE):
            logger.warning("Vector and target, refused but forced: %s", line)

    def _log_summary(self, model_config: ModelConfig, stream: FusedStream, seconds: float) -> None:
        if stream.alpha == 0:
            logger.info("Loaded %s unchanged: alpha is 0", model_config.model)
            return
        ledger = stream.ledger
        logger.info(
            "Fused %s with %s at alpha %s: %d copies, %d elements, %.2f s; computed early: %s",
            model_config.model,
            stream.vector.folder,
            stream.alpha,
            ledger.copies,
            ledger.elements,
            seconds,
            dict(ledger.materialized) or "none",
        )


def _tokenizer_file(model_config: ModelConfig) -> Path | None:
    """Find the target's tokenizer.json: in its folder, or where the Hub's client keeps it."""
    folder = Path(model_config.model)
    if is_folder(folder):
        return folder / TOKENIZER_NAME
    try:
        found = try_to_load_from_cache(
            model_config.model, TOKENIZER_NAME, revision=model_config.revision
        )
    except ValueError:  # no Hub id either: something that vLLM reads by other means
        return None
    return Path(found) if isinstance(found, str) else None


@contextmanager
def _logged_errors() -> Iterator[None]:
    """Log an error of ours in one place of the engine's log before vLLM wraps it in tracebacks."""
    try:
        yield
    except RvecError as exc:
        logger.error("%s%s: %s", ERROR_MARKER, type(exc).__name__, exc)  # noqa: TRY400 - the traceback follows, from vLLM
        raise
