"""Which safetensors entries a stored tensor is made of: FORMAT.md's parts. Imports no torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from vllm_rvec.checkpoint.table import FLOAT_DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_rvec.checkpoint.table import TensorInfo, TensorTable
    from vllm_rvec.vector.manifest import TensorEntry

__all__ = [
    "BITMAP",
    "GAPS",
    "INT8",
    "LORA_A",
    "LORA_B",
    "SCALE",
    "VALUES",
    "bitmap_bytes",
    "longest_part_names",
    "part_names",
    "part_problems",
]

VALUES, BITMAP, GAPS = ":values", ":bitmap", ":gaps"
SCALE, INT8 = ":scale", ":int8"
LORA_A, LORA_B = ":lora_A", ":lora_B"

BITMAP_ALIGNMENT = 64
"""A bitmap is padded to whole 8 bytes, so that what follows it in the file is aligned."""

SUFFIXES = {
    "zero": (),
    "dense": ("",),
    "sparse": (VALUES, BITMAP, GAPS),
    "int8": (SCALE, INT8),
    "lowrank": (LORA_A, LORA_B),
}
"""What may follow a tensor's name. A sparse one has either a bitmap or gaps."""


def bitmap_bytes(elements: int) -> int:
    """Return the size of a bitmap for so many elements."""
    return math.ceil(elements / BITMAP_ALIGNMENT) * BITMAP_ALIGNMENT // 8


def longest_part_names(name: str) -> tuple[str, str]:
    """Return two names as long as those of any two parts of a tensor."""
    longest = name + max((VALUES, BITMAP, GAPS, SCALE, INT8, LORA_A, LORA_B), key=len)
    return longest, longest


def part_names(name: str, entry: TensorEntry, table: TensorTable) -> tuple[str, ...]:
    """Name the entries that a tensor is stored in, of those that its shards hold."""
    names = tuple(name + suffix for suffix in SUFFIXES[entry.encoding])
    if entry.encoding == "sparse":
        return tuple(part for part in names if part in table)
    return names


def part_problems(name: str, entry: TensorEntry, table: TensorTable) -> Iterator[str]:
    """Say what is wrong with the entries that a tensor is stored in, from their headers.

    Args:
        name: The tensor.
        entry: What the manifest says of it.
        table: What the shards hold.

    Yields:
        One line for each problem.
    """
    names = part_names(name, entry, table)
    if missing := [part for part in names if part not in table]:
        yield from (f"{part}: in the manifest, in no shard" for part in missing)
        return
    if entry.encoding == "sparse" and (len(names) != 2 or name + VALUES not in names):
        yield f"{name}: sparse, but its shards hold {', '.join(names) or 'no part of it'}"
        return
    infos = {part.removeprefix(name): table[part] for part in names}
    for suffix, info in infos.items():
        dtypes, shape = _expected(suffix, entry, infos)
        if info.dtype not in dtypes:
            yield f"{name}{suffix}: dtype {info.dtype}, not {' or '.join(dtypes)}"
        if info.shape != shape:
            yield f"{name}{suffix}: shape {list(info.shape)}, not {list(shape)}"


def _expected(  # noqa: PLR0911 - one answer for each kind of part
    suffix: str, entry: TensorEntry, infos: dict[str, TensorInfo]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the dtypes and the shape that a part must have, given its siblings."""
    match suffix:
        case "":
            return (entry.dtype,), entry.shape
        case ":values":
            own = infos[VALUES].shape  # any number of them; its sibling must have as many
            return (entry.dtype,), own[:1] or (0,)
        case ":bitmap":
            return ("U8",), (bitmap_bytes(entry.elements),)
        case ":gaps":
            return ("U8", "U16"), infos[VALUES].shape
        case ":scale":
            return ("F32",), (math.prod(entry.shape[:-1]),)
        case ":int8":
            return ("I8",), entry.shape
        case ":lora_A":
            return FLOAT_DTYPES, (*infos[LORA_A].shape[:1], *entry.shape[1:])
        case _:
            return FLOAT_DTYPES, (*entry.shape[:1], *infos[LORA_A].shape[:1])
