"""Whether a target was quantized beforehand, and what of a vector could still be added to it.

A quantized weight is a code with a scale: theta + alpha * v has no code. Where the vector changes
such a weight, nothing helps, and `force` is not heard: the rest of the sum would be served as if it
were the whole. Where all that it changes is stored unquantized beside the codes (the attention of a
model with quantized experts, say) it is refused too, but may be forced: quantizers like AWQ and
SmoothQuant rescale such neighbours, and only who made the checkpoint knows.

Imports no torch. Not here: quantization while loading, which sees fused weights and needs no check.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from vllm_rvec.vector.compatibility.report import Level, refused
from vllm_rvec.vector.compatibility.structure import parts_without_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vllm_rvec.vector.compatibility.structure import Pairing

__all__ = ["WAYS_OUT", "beside_level", "declared_quantization", "quantization_level"]

CONFIG_KEYS: Final = ("quantization_config", "compression_config")
CONFIG_FILES: Final = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Where ModelOpt, and older GPTQ and AWQ, describe a quantization beside config.json."""

WHY: Final = "a quantized weight is a code with a scale, and theta + alpha * v has none"
WAYS_OUT: Final = (
    "load the unquantized target and let vLLM quantize it online, which sees the sum "
    "(--quantization fp8_per_channel, for one); or merge (vllm-rvec merge) and quantize the "
    "result; or compute the vector beside the codes (vllm-rvec serve --mode dial)"
)

KEEPS_INPUTS: Final = frozenset({"bitsandbytes", "fbgemm_fp8", "fp8", "gptq", "mxfp4"})
"""Methods that leave what goes into a quantized layer as it was."""


def declared_quantization(config: Mapping[str, Any], folder: Path | None = None) -> str:
    """Name the method by which a checkpoint says that it was quantized; empty where it says none.

    Args:
        config: Its config.json.
        folder: Its folder, where it is on this machine.

    >>> declared_quantization({"quantization_config": {"quant_method": "gptq", "bits": 4}})
    'gptq'
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for found in map(part.get, CONFIG_KEYS):
            if isinstance(found, Mapping) and found:
                return _method(found)
    beside = (name for name in CONFIG_FILES if folder is not None and (folder / name).exists())
    return next(beside, "")


def quantization_level(
    pairing: Pairing, method: str, is_float: Mapping[str, bool] | None
) -> Level | None:
    """Judge a target that was quantized beforehand.

    Args:
        pairing: The vector's manifest, and the vocabulary policy.
        method: As `declared_quantization` names it.
        is_float: Every tensor of the target, and whether it is of a dtype that can be added to;
            None where that is not known yet.

    Returns:
        None for a target that is not quantized.
    """
    stuck = [] if is_float is None else list(_stuck(pairing, method, is_float))
    if stuck:
        summary = f"the target is quantized ({method})" if method else "the target is quantized"
        return Level(
            "quantization",
            f"{summary}, and the vector changes {len(stuck)} quantized tensors",
            tuple(map(refused, stuck)),
            why=WHY,
            fix=WAYS_OUT,
        )
    if not method:
        return None
    unknown = "which of its tensors are is not known before they are read"
    beside = "what the vector changes is not, but some methods rescale the tensors beside theirs"
    finding = f"{method}: {unknown if is_float is None else beside}; {WAYS_OUT}"
    return Level("quantization", "the target is quantized", (refused(finding),))


def beside_level(method: str) -> Level | None:
    """Judge a quantized target whose vector is computed beside it, as a dial does.

    The codes stay as they are, so any method will do that leaves the inputs of its layers alone.
    Some (AWQ, SmoothQuant) divide them by scales of their own, with which v x would have to be
    undone.

    Args:
        method: As `declared_quantization` names it.

    Returns:
        None where nothing is to be said.
    """
    if not method:
        return None
    if method in KEEPS_INPUTS:
        return Level("quantization", f"the target is quantized ({method}), the vector is beside it")
    finding = (
        f"{method}: it may have rescaled what goes into its layers, as AWQ and SmoothQuant do; the "
        "vector belongs to inputs that were not. Force it if you know that it has not"
    )
    return Level("quantization", "the target is quantized", (refused(finding),))


def _method(found: Mapping[str, Any]) -> str:
    producer = found.get("producer")
    name = producer.get("name") if isinstance(producer, Mapping) else None
    return str(found.get("quant_method") or name or "by a method without a name")


def _stuck(pairing: Pairing, method: str, is_float: Mapping[str, bool]) -> Iterator[str]:
    """Say to which of the target's tensors the vector's can't be added."""
    entries = pairing.manifest.tensors
    for name in sorted(name for name, addable in is_float.items() if not addable):
        part = pairing.part_for(name)
        if part is not None and entries[part].encoding != "zero" and not pairing.is_skipped(name):
            yield f"{name}: the target's tensor is quantized, nothing can be added to it"
    if not method:
        return
    for part in parts_without_tensor(pairing, is_float):
        if entries[part].encoding != "zero":
            yield f"{part}: the target stores it in other tensors, as codes and scales"
