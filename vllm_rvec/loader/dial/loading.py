"""Making a loaded model a dial: v into shadows, shadows beside the model's modules."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING

import torch
from blake3 import blake3

from vllm_rvec.errors import ConfigError
from vllm_rvec.loader.dial.installing import install
from vllm_rvec.loader.dial.layers import Batch
from vllm_rvec.loader.dial.parts import ADMISSION, FLAGS, SCHEDULER, WORKER
from vllm_rvec.loader.dial.shadow import create_shadow, fill_shadow
from vllm_rvec.loader.dial.turns import Turns
from vllm_rvec.loader.fused_tensor import FusedTensor, FuseLedger, Fusion
from vllm_rvec.loader.placement import Placer
from vllm_rvec.vector.stored import Team

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from vllm_rvec.loader.config import LoaderConfig
    from vllm_rvec.loader.stream import FusedStream
    from vllm_rvec.loader.vllm_api import ModelConfig, VllmConfig
    from vllm_rvec.vector.addend import Addend

__all__ = ["make_dial", "refuse_undialable"]

logger = logging.getLogger("vllm.rvec")


def refuse_undialable(vllm_config: VllmConfig) -> None:
    """Refuse an engine that could not tell one request's alpha from another's.

    Raises:
        ConfigError: All that is missing or in the way.
    """
    problems = [*_missing(vllm_config), *_in_the_way(vllm_config)]
    if problems:
        raise ConfigError(
            "this engine can't answer an alpha for each request",
            problems=problems,
            fix=f"vllm-rvec serve --mode dial gives the flags: {FLAGS}",
        )


def _missing(config: VllmConfig) -> Iterator[str]:
    if not getattr(config.parallel_config, "rvec_dial_worker", False):
        yield f"--worker-cls {WORKER} is missing"
    if config.scheduler_config.scheduler_cls != SCHEDULER:
        yield f"--scheduler-cls {SCHEDULER} is missing"
    given = config.model_config.logits_processors or ()
    if ADMISSION not in [p if isinstance(p, str) else _path(p) for p in given]:
        yield f"--logits-processors {ADMISSION} is missing"


def _in_the_way(config: VllmConfig) -> Iterator[str]:
    model = config.model_config
    if config.use_v2_model_runner:
        yield "vLLM's second model runner: set VLLM_USE_V2_MODEL_RUNNER=0"
    if config.parallel_config.pipeline_parallel_size > 1:
        yield "pipeline parallel: use tensor parallel"
    if config.speculative_config is not None:
        yield "speculative decoding: vLLM rules it out beside --logits-processors"
    if config.lora_config is not None:
        yield "--enable-lora: adapters wrap the same layers"
    if model.runner_type == "pooling":
        yield "pooling: it has no alphas for requests"
    if model.enable_prompt_embeds:
        yield "--enable-prompt-embeds: embeddings that a request brings have no alpha"
    if model.enable_sleep_mode:
        yield "--enable-sleep-mode: the vectors would not wake up again"


def _path(given: type) -> str:
    return f"{given.__module__}:{given.__qualname__}"


def make_dial(
    model: nn.Module,
    vllm_config: VllmConfig,
    model_config: ModelConfig,
    config: LoaderConfig,
    stream: FusedStream,
) -> Batch:
    """Put vectors beside a model's modules.

    Args:
        model: Loaded with theta, and ready to run.
        vllm_config: The engine's.
        model_config: The target's.
        config: Ours.
        stream: What the target came by: the vectors, each with the recipe's own alphas, and the
            shapes of the target's tensors.

    Returns:
        What tells the modules which alphas a step has; all are 0 to begin with.

    Raises:
        ConfigError: Something that a vector changes can't be applied.
    """
    started = time.perf_counter()
    shadows = []
    for addend in stream.addends:
        shadow = create_shadow(vllm_config, model_config)
        weights = VectorStream(addend, stream.shapes, model_config.dtype)
        fill_shadow(shadow, weights)
        _judge_left_out(weights.left_out(), is_forced=config.force)
        shadows.append(shadow)
    device = next(model.parameters()).device
    off = Turns.all_at([0.0] * len(shadows), device)
    batch = Batch(off, off, len(shadows))
    batch.has_batch_axis = ".transformers" in type(model).__module__
    done = install(model, shadows, batch, config.vector_dtype)
    batch.names = done.modules
    # vLLM finds compiled graphs again by its configuration: these have v in these modules.
    said = blake3("\n".join(done.modules).encode()).hexdigest()
    vllm_config.additional_config = {**(vllm_config.additional_config or {}), "vllm_rvec": said}
    logger.info(
        "Any alpha in %s for each request: %s beside %d modules, %.2f GiB%s, %.2f s",
        config.dial.allowed,
        " and ".join(config.dial.vectors),
        len(done.modules),
        done.held_bytes / 2**30,
        f" as int8, relative error {done.worst}" if done.worst else "",
        time.perf_counter() - started,
    )
    return batch


class VectorStream:
    """A vector as if it were a checkpoint: 0 + alpha v, in the recipe's alphas. Read once.

    Args:
        addend: The vector.
        shapes: Of the target's tensors, by the checkpoint's names.
        dtype: The model's.
    """

    def __init__(
        self, addend: Addend, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
    ) -> None:
        self._addend, self._shapes, self._dtype = addend, shapes, dtype
        self.computed_early: dict[str, str] = {}
        """Tensors that a weight loader wanted computed, and the operation that asked."""
        self._given: set[str | None] = set()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (checkpoint name, tensor), of what the vector changes."""
        addend, dtype, team = self._addend, self._dtype, Team()
        placer = Placer(team, "host")
        room = torch.zeros(0, dtype=dtype)
        for name, shape in self._all_shapes():
            if (term := addend.term(name, shape)) is None:
                continue
            ledger, elements = FuseLedger(), math.prod(shape)
            if len(room) < elements:
                room = torch.zeros(elements, dtype=dtype)  # one for all: only read
            zeros = room[:elements].view(shape)
            yield name, FusedTensor(zeros, Fusion((term,), 0, dtype, ledger, team, placer))
            self._given.add(addend.pairing.part_for(name))
            if ledger.materialized:
                self.computed_early[name] = ", ".join(ledger.materialized)
        placer.finish()
        addend.reader.check_unchanged()

    def left_out(self) -> list[str]:
        """Name what the vector changes and the stream did not have, once it was read.

        Only of a quantized target, whose names and shapes can't be compared before, is there any.
        """
        addend = self._addend
        entries = addend.reader.manifest.tensors
        return sorted(
            part
            for part, alpha in addend.alphas.items()
            if alpha and part not in self._given and entries[part].encoding != "zero"
            if not addend.pairing.is_skipped(part)
        )

    def _all_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The target's tensors, and those of the vector that a quantized one stores otherwise."""
        yield from self._shapes.items()
        covered = {self._addend.pairing.part_for(name) for name in self._shapes}
        for part, entry in self._addend.reader.manifest.tensors.items():
            if part not in covered:
                yield part, entry.shape


def _judge_left_out(lost: list[str], *, is_forced: bool) -> None:
    if not lost:
        return
    error = ConfigError(
        f"{len(lost)} tensors of the vector don't fit the target",
        problems=lost,
        fix="check that vector and target belong together; with `force` they are left out",
    )
    if not is_forced:
        raise error
    logger.warning("Forced: %s", error)
