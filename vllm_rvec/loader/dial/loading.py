"""Making a loaded model a dial: v into shadows, shadows beside the model's modules."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch

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
    from collections.abc import Iterable, Iterator, Mapping

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
    parallel, problems = vllm_config.parallel_config, []
    if not getattr(parallel, "rvec_dial_worker", False):
        problems.append(f"--worker-cls {WORKER} is missing")
    if vllm_config.scheduler_config.scheduler_cls != SCHEDULER:
        problems.append(f"--scheduler-cls {SCHEDULER} is missing")
    given = vllm_config.model_config.logits_processors or ()
    if ADMISSION not in [p if isinstance(p, str) else _path(p) for p in given]:
        problems.append(f"--logits-processors {ADMISSION} is missing")
    if vllm_config.use_v2_model_runner:
        problems.append("vLLM's second model runner: set VLLM_USE_V2_MODEL_RUNNER=0")
    if parallel.pipeline_parallel_size > 1:
        problems.append("pipeline parallel: use tensor parallel")
    if vllm_config.speculative_config is not None:
        problems.append("speculative decoding: vLLM rules it out beside --logits-processors")
    if vllm_config.lora_config is not None:
        problems.append("--enable-lora: adapters wrap the same layers")
    if problems:
        raise ConfigError(
            "this engine can't answer an alpha for each request",
            problems=problems,
            fix=f"vllm-rvec serve --mode dial gives the flags: {FLAGS}",
        )


def _path(given: type) -> str:
    return f"{given.__module__}.{given.__qualname__}"


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
        early: dict[str, str] = {}
        fill_shadow(shadow, vector_stream(addend, stream.shapes, model_config.dtype, early), early)
        shadows.append(shadow)
    device = next(model.parameters()).device
    off = Turns.all_at([0.0] * len(shadows), device)
    batch = Batch(off, off, len(shadows))
    done = install(model, shadows, batch, config.vector_dtype)
    batch.names = done.modules
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


def vector_stream(
    addend: Addend,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    computed_early: dict[str, str],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream a vector as if it were a checkpoint: 0 + alpha v, in the recipe's alphas.

    Args:
        addend: The vector.
        shapes: Of the target's tensors.
        dtype: The model's.
        computed_early: Gets the tensors that a weight loader wanted computed, and the operation.

    Yields:
        (checkpoint name, tensor), of what the vector changes.
    """
    team = Team()
    placer = Placer(team, "host")
    for name, shape in _all_shapes(addend, shapes):
        if (term := addend.term(name, shape)) is None:
            continue
        ledger = FuseLedger()
        zeros = torch.zeros(shape, dtype=dtype)
        yield name, FusedTensor(zeros, Fusion((term,), 0, dtype, ledger, team, placer))
        if ledger.materialized:
            computed_early[name] = ", ".join(ledger.materialized)
    placer.finish()
    addend.reader.check_unchanged()


def _all_shapes(
    addend: Addend, shapes: Mapping[str, tuple[int, ...]]
) -> Iterable[tuple[str, tuple[int, ...]]]:
    """The target's tensors, and those of the vector that a quantized target stores otherwise."""
    yield from shapes.items()
    covered = {addend.pairing.part_for(name) for name in shapes}
    for part, entry in addend.reader.manifest.tensors.items():
        if part not in covered:
            yield part, entry.shape
