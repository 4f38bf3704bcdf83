"""`--load-format rvec`: one of vLLM's own loaders, with a vector added to its weight stream.

The sum enters in the stream of `get_all_weights`, which vLLM reads at load, at `reload_weights` and
at the wake from level-2 sleep: always from the stored target, so nothing drifts and nothing is
lost. Only the target is fused: a speculative draft is loaded as if this loader were not there.

Each load checks that the vector belongs to the target, also at alpha 0. It trusts the vector's
bytes: `serve` and `vllm-rvec verify` look at them once.
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_rvec.checkpoint.remote import shown
from vllm_rvec.checkpoint.table import is_folder, read_table
from vllm_rvec.errors import ERROR_MARKER, ConfigError, RvecError
from vllm_rvec.loader import LOAD_FORMAT
from vllm_rvec.loader.base_loaders import draft_loader, target_loader
from vllm_rvec.loader.config import LoaderConfig
from vllm_rvec.loader.dial.loading import make_dial, refuse_undialable
from vllm_rvec.loader.fetching import find_vector, target_file
from vllm_rvec.loader.kv_stores import refuse_shared_stores, refuse_weight_cache
from vllm_rvec.loader.stream import FusedStream
from vllm_rvec.loader.vllm_api import BaseModelLoader, should_skip_weight
from vllm_rvec.vector.addend import Addend
from vllm_rvec.vector.compatibility.check import addable_tensors
from vllm_rvec.vector.compatibility.quantization import (
    beside_level,
    declared_quantization,
    quantization_level,
)
from vllm_rvec.vector.compatibility.report import Level, Report, Verdict, refused
from vllm_rvec.vector.compatibility.structure import (
    architecture_findings,
    is_for_language_part,
    structure_level,
)
from vllm_rvec.vector.compatibility.tokenizer import TOKENIZER_NAME, tokenizer_level
from vllm_rvec.vector.reader import VectorReader

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    import torch

    from vllm_rvec.loader.vllm_api import LoadConfig, ModelConfig, VllmConfig
    from vllm_rvec.vector.compatibility.structure import Pairing
    from vllm_rvec.vector.recipe import RecipeVector

__all__ = ["RvecModelLoader"]

# vLLM gives handlers to loggers under its own name only; others vanish in engine processes.
logger = logging.getLogger("vllm.rvec")


class RvecModelLoader(BaseModelLoader):  # type: ignore[misc]  # vLLM is untyped here
    """Loads a safetensors checkpoint as theta + alpha * v.

    Args:
        load_config: vLLM's, with `vector` and `alpha` in `model_loader_extra_config`.

    Raises:
        ConfigError: The extra configuration is wrong, or names a loader that can't be used.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        with _logged_errors():
            self.config, options = LoaderConfig.split(load_config.model_loader_extra_config)
            self.base = target_loader(load_config, self.config.base_format, options)
        self.stream: FusedStream | None = None

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> torch.nn.Module:
        """Create a model and load its weights, fused if it is the target.

        Raises:
            ConfigError: A draft is to be loaded by this loader.
            RvecError: As for `load_weights`.
        """
        is_dial = self.config.mode == "dial"
        with _logged_errors():
            _refuse_fused_draft(vllm_config)
            if is_dial:
                refuse_undialable(vllm_config)
        model: torch.nn.Module = super().load_model(vllm_config, model_config, prefix)
        if is_dial and self.stream is not None:
            with _logged_errors():
                model.rvec_batch = make_dial(  # type: ignore[assignment]  # no parameter, no module
                    model, vllm_config, model_config, self.config, self.stream
                )
        return model

    def download_model(self, model_config: ModelConfig) -> None:
        """Fetch the target, as vLLM does."""
        self.base.download_model(model_config)

    def create_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> torch.nn.Module:
        """Create the model, empty, where nothing can mix its weights or caches with others'.

        Raises:
            ConfigError: A KV store or a cache of weights would, since its keys don't know alpha.
        """
        with _logged_errors():
            refuse_weight_cache()
            refuse_shared_stores(
                vllm_config.kv_transfer_config, is_allowed=self.config.kv_connector == "allow"
            )
        model: torch.nn.Module = super().create_model(vllm_config, model_config, prefix)
        return model

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Fill a model's parameters with fused weights.

        Raises:
            RvecError: The vector can't be read or does not belong to this target.
        """
        if _is_draft(model_config):
            draft_loader(self.load_config).load_weights(model, model_config)
            return
        # All that vLLM does around its stream (filters, tracking) stays as it is.
        self.base.load_weights(_FusedModel(model, self, model_config), model_config)
        if self.stream is not None and not self.stream.is_complete:
            with _logged_errors():
                unread = refused(
                    f"the model class {type(model).__name__} left tensors unread, so it is not "
                    "known whether the vector covers them"
                )
                level = Level("structure", "not read to its end", (unread,))
                self._judge(self.config.recipe[0], model_config, level)

    def get_all_weights(
        self, model_config: ModelConfig, model: torch.nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Stream the target's tensors, each fused with its parts of the vectors.

        Raises:
            RvecError: The vector can't be read or does not belong to this target.
        """
        if _is_draft(model_config):
            return iter(draft_loader(self.load_config).get_all_weights(model_config, model))
        return self.fuse(self.base.get_all_weights(model_config, model), model_config)

    def fuse(
        self, weights: Iterable[tuple[str, torch.Tensor]], model_config: ModelConfig
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Add the vector to a stream of the target's tensors.

        Raises:
            RvecError: The vector can't be read or does not belong to this target.
        """
        with _logged_errors():
            self.stream = self._open_stream(model_config)
            started = time.perf_counter()
            yield from self.stream.fuse(weights)
            seconds = time.perf_counter() - started
            tied = getattr(model_config.hf_config, "tie_word_embeddings", None)
            judged = self.stream.levels(
                is_tied=tied,
                quantization=_declared(model_config),
                is_left_out=self._is_left_out,
                is_beside=self.config.mode == "dial",
            )
            for vector, levels in zip(self.config.recipe, judged, strict=True):
                self._judge(vector, model_config, *levels)
            self._log_summary(model_config, self.stream, seconds)

    def _is_left_out(self, name: str) -> bool:
        """Tell whether vLLM left a tensor to the ranks that hold its expert."""
        # Only some of vLLM's loaders have the filter.
        own_experts = getattr(self.base, "local_expert_ids", None)
        left_out: bool = should_skip_weight(name, own_experts)
        return left_out

    def _open_stream(self, model_config: ModelConfig) -> FusedStream:
        # A dial streams the target as it is; its vectors come beside it, each at alpha 1.
        is_dial = self.config.mode == "dial"
        alpha = 1.0 if is_dial else self.config.alpha
        return FusedStream(
            addends=[
                self._open_addend(vector, alpha, model_config) for vector in self.config.recipe
            ],
            alpha=0.0 if is_dial else alpha,
            dtype=model_config.dtype,
            fuse_on=self.config.fuse_on,
        )

    def _open_addend(self, vector: RecipeVector, alpha: float, model_config: ModelConfig) -> Addend:
        """Open a vector; check first what can be checked before any weight is read."""
        reader = VectorReader(find_vector(vector.path).folder)
        facts = _facts(model_config)
        addend = Addend.of(
            reader,
            alpha,
            self.config.vocabulary,
            vector if self.config.vectors else None,
            is_partial=is_for_language_part(reader.manifest, facts),
        )
        self._judge(
            vector,
            model_config,
            beside_level(_declared(model_config))
            if self.config.mode == "dial"
            else _quantization(addend.pairing, model_config),
            structure_level(architecture_findings(reader.manifest, facts), ()),
            tokenizer_level(reader.manifest.tokenizer, target_file(model_config, TOKENIZER_NAME)),
        )
        return addend

    def _judge(
        self, vector: RecipeVector, model_config: ModelConfig, *levels: Level | None
    ) -> None:
        """Log what the check warns of, and raise or log what it refuses."""
        asked = tuple(level for level in levels if level is not None)
        report = Report(shown(vector.path), model_config.model, asked)
        report.raise_if_refused(self.config.force)
        for line in report.lines(Verdict.WARN):
            logger.warning("Vector and target: %s", line)
        for line in report.lines(Verdict.REFUSE):
            logger.warning("Vector and target, refused but forced: %s", line)

    def _log_summary(self, model_config: ModelConfig, stream: FusedStream, seconds: float) -> None:
        if self.config.mode == "dial":
            return  # what it does is said when the vectors are beside the target
        if stream.alpha == 0:
            logger.info("Loaded %s unchanged: alpha is 0", model_config.model)
            return
        ledger = stream.ledger
        logger.info(
            "Fused %s with %s at alpha %s: %d copies, %d elements, %.2f s; computed early: %s%s",
            model_config.model,
            " and ".join(str(addend.reader.folder) for addend in stream.addends),
            stream.alpha,
            ledger.copies,
            ledger.elements,
            seconds,
            dict(ledger.materialized) or "none",
            f"; ways to the GPU: {summary}" if (summary := stream.placer.summary()) else "",
        )


class _FusedModel:
    """A model as vLLM's own loader sees it: all its own, but what it loads is fused first."""

    def __init__(
        self, model: torch.nn.Module, loader: RvecModelLoader, model_config: ModelConfig
    ) -> None:
        self._model, self._loader, self._model_config = model, loader, model_config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        return self._model.load_weights(self._loader.fuse(weights, self._model_config))  # type: ignore[operator]  # vLLM's models have it


def _is_draft(model_config: ModelConfig) -> bool:
    """Tell a speculative draft, or an MTP head of the target's own checkpoint, from the target."""
    return getattr(model_config, "runner_type", None) == "draft"


def _refuse_fused_draft(vllm_config: VllmConfig) -> None:
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.draft_load_config is None:
        return
    if speculative.draft_load_config.load_format == LOAD_FORMAT:
        raise ConfigError(
            f"draft_load_config can't be {LOAD_FORMAT}",
            why="the vector is added to the target alone; a draft changes the speed of answers, "
            "never their text",
            fix="leave draft_load_config out, or give it another load_format",
        )


def _declared(model_config: ModelConfig) -> str:
    folder = Path(model_config.model)
    config = model_config.hf_config.to_dict()
    return declared_quantization(config, folder if is_folder(folder) else None)


def _quantization(pairing: Pairing, model_config: ModelConfig) -> Level | None:
    """Judge a target that says that it is quantized, by its headers where they are at hand."""
    if not (method := _declared(model_config)):
        return None
    folder = Path(model_config.model)
    table = addable_tensors(read_table(folder)) if is_folder(folder) else None
    return quantization_level(pairing, method, table)


def _facts(model_config: ModelConfig) -> dict[str, object]:
    """Say what kind of model a target is, as its config.json does."""
    whole, part = model_config.hf_config, model_config.hf_text_config
    return {
        "model_type": whole.model_type,
        "architectures": whole.architectures,
        "text_config": {"model_type": part.model_type},
    }


@contextmanager
def _logged_errors() -> Iterator[None]:
    """Log an error of ours in one place of the engine's log before vLLM wraps it in tracebacks."""
    try:
        yield
    except RvecError as exc:
        logger.error("%s%s: %s", ERROR_MARKER, type(exc).__name__, exc)  # noqa: TRY400 - the traceback follows, from vLLM
        raise
