"""What the numbers of a stored tensor's parts must be, told from one pass over their bytes.

Takes the bytes in pieces and keeps a few numbers of each part, so that a tensor is checked in small
memory whatever shape it decodes to. numpy only, no torch: `serve` runs it before any engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from vllm_rvec.vector.layout import BITMAP, GAPS, INT8, LORA_A, LORA_B, SCALE, VALUES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy.typing as npt

    from vllm_rvec.vector.manifest import TensorEntry

    Bytes = npt.NDArray[np.uint8]

__all__ = ["PIECE_ALIGNMENT", "PartFacts", "part_suffix", "tensor_problems"]

PIECE_ALIGNMENT: Final = 8
"""Pieces are multiples of so many bytes but for a part's last, and so hold whole elements."""

FLOAT32_MAX: Final = float(np.finfo(np.float32).max)

NOT_FINITE = "NaN or infinity"


@dataclass(slots=True)
class PartFacts:
    """What the pieces of one part have told so far."""

    suffix: str
    """Which part it is: what follows the tensor's name."""
    dtype: str
    """In safetensors' words."""
    largest: float = 0.0
    """The largest magnitude; infinite where an element is infinite or NaN."""
    total: int = 0
    """Bits that are set in a bitmap; the sum of gaps."""
    last_word: int = 0
    """A bitmap's last eight bytes."""

    def add(self, piece: Bytes) -> None:
        """Take the part's next bytes into account."""
        if piece.size == 0:
            return
        if self.suffix == BITMAP:
            words = piece.view("<u8")
            self.total += int(np.bitwise_count(words).sum(dtype=np.int64))
            self.last_word = int(words[-1])
        elif self.suffix == GAPS:
            self.total += int(piece.view(_GAPS[self.dtype]).sum(dtype=np.int64))
        elif self.dtype == "I8":
            signed = piece.view(np.int8)
            self.largest = max(self.largest, int(signed.max()), -int(signed.min()))
        else:
            self.largest = max(self.largest, _largest_magnitude(piece, self.dtype))


_GAPS: Final = {"U8": "u1", "U16": "<u2"}


def _largest_magnitude(piece: Bytes, dtype: str) -> float:
    # Without their signs, floats are in the order of their bits; infinity and NaN come last.
    if dtype == "F32":
        bits = int((piece.view("<u4") & np.uint32(0x7FFF_FFFF)).max())
        found = np.uint32(bits).view(np.float32)
    else:
        bits = int((piece.view("<u2") & np.uint16(0x7FFF)).max())
        is_half = dtype == "F16"
        found = np.uint16(bits).view(np.float16) if is_half else np.uint32(bits << 16).view("f4")
    return float(found) if np.isfinite(found) else math.inf


def part_suffix(part: str) -> str:
    """Return what follows the tensor's name in the name of a part.

    >>> part_suffix("model.norm.weight:values"), part_suffix("model.norm.weight")
    (':values', '')
    """
    _, colon, kind = part.rpartition(":")
    return colon + kind if colon else ""


def tensor_problems(
    entry: TensorEntry, facts: Mapping[str, PartFacts], count: int
) -> Iterator[str]:
    """Say what is wrong with a tensor's data.

    Args:
        entry: Its manifest entry, which agrees with the headers.
        facts: What its parts' bytes have told, by suffix.
        count: How many values it has, where it is sparse; the rank, where it is lowrank.

    Yields:
        One line for each problem.
    """
    bad = [suffix for suffix, fact in facts.items() if not math.isfinite(fact.largest)]
    yield from (f"{NOT_FINITE} in {suffix[1:]}" if suffix else NOT_FINITE for suffix in bad)
    if entry.encoding == "sparse":
        yield from _sparse_problems(entry, facts, count)
    elif entry.encoding == "int8" and not bad:
        if facts[SCALE].largest * facts[INT8].largest > FLOAT32_MAX:
            yield "a row's scale times its largest element is more than float32 holds"
    elif entry.encoding == "lowrank" and not bad:
        product = facts[LORA_A].largest * facts[LORA_B].largest * count
        if abs(entry.scaling or 0.0) * product > FLOAT32_MAX:
            yield "the product of its factors can be more than float32 holds"


def _sparse_problems(
    entry: TensorEntry, facts: Mapping[str, PartFacts], count: int
) -> Iterator[str]:
    if GAPS in facts:
        if count and facts[GAPS].total + count > entry.elements:
            yield "its gaps lead beyond its last element"
        return
    if facts[BITMAP].total != count:
        yield f"its bitmap has {facts[BITMAP].total} bits for {count} {VALUES[1:]}"
    used = entry.elements % 64
    if used and facts[BITMAP].last_word >> used:
        yield "its bitmap has bits beyond its last element"
