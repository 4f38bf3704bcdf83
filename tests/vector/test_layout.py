"""vllm_rvec.vector.layout: which parts a tensor must have, and what is said of others."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_rvec.checkpoint.table import TensorInfo, TensorTable
from vllm_rvec.vector.layout import bitmap_bytes, longest_part_names, part_names, part_problems
from vllm_rvec.vector.manifest import Encoding, TensorEntry

Claims = dict[str, tuple[str, tuple[int, ...]]]


def table(claims: Claims) -> TensorTable:
    return {
        f"t{suffix}": TensorInfo(Path("v.safetensors"), shape, dtype, 0, 0)
        for suffix, (dtype, shape) in claims.items()
    }


def entry(encoding: Encoding, shape: tuple[int, ...], dtype: str = "F32") -> TensorEntry:
    scaling = 1.0 if encoding == "lowrank" else None
    return TensorEntry(shape=shape, dtype=dtype, encoding=encoding, scaling=scaling)


SOUND: list[tuple[TensorEntry, Claims]] = [
    (entry("zero", (4, 5), "I64"), {}),
    (entry("dense", (4, 5), "BF16"), {"": ("BF16", (4, 5))}),
    (entry("dense", ()), {"": ("F32", ())}),
    (entry("sparse", (10,)), {":values": ("F32", (3,)), ":bitmap": ("U8", (8,))}),
    (entry("sparse", (0, 3)), {":values": ("F32", (0,)), ":bitmap": ("U8", (0,))}),
    (entry("sparse", (1 << 40,), "F16"), {":values": ("F16", (3,)), ":gaps": ("U16", (3,))}),
    (entry("int8", (2, 3, 4)), {":scale": ("F32", (6,)), ":int8": ("I8", (2, 3, 4))}),
    (entry("int8", (4,)), {":scale": ("F32", (1,)), ":int8": ("I8", (4,))}),
    (entry("lowrank", (4, 6)), {":lora_A": ("BF16", (2, 6)), ":lora_B": ("F32", (4, 2))}),
]

FALSE: list[tuple[TensorEntry, Claims, str]] = [
    (entry("dense", (4, 5)), {}, "t: in the manifest, in no shard"),
    (entry("dense", (4, 5)), {"": ("BF16", (4, 5))}, "t: dtype BF16, not F32"),
    (entry("dense", (4, 5)), {"": ("F32", (5, 4))}, "t: shape [5, 4], not [4, 5]"),
    (entry("sparse", (10,)), {}, "t: sparse, but its shards hold no part of it"),
    (entry("sparse", (10,)), {":values": ("F32", (3,))}, "t: sparse, but its shards hold t:values"),
    (
        entry("sparse", (10,)),
        {":values": ("F32", (3,)), ":bitmap": ("U8", (8,)), ":gaps": ("U8", (3,))},
        "t: sparse, but its shards hold t:values, t:bitmap, t:gaps",
    ),
    (
        entry("sparse", (10,)),
        {":bitmap": ("U8", (8,)), ":gaps": ("U8", (3,))},
        "t: sparse, but its shards hold t:bitmap, t:gaps",
    ),
    (
        entry("sparse", (10,)),
        {":values": ("F32", (3, 1)), ":bitmap": ("U8", (8,))},
        "t:values: shape [3, 1], not [3]",
    ),
    (
        entry("sparse", (10,)),
        {":values": ("F32", ()), ":bitmap": ("U8", (8,))},
        "t:values: shape [], not [0]",
    ),
    (
        entry("sparse", (65,)),
        {":values": ("F32", (3,)), ":bitmap": ("U8", (8,))},
        "t:bitmap: shape [8], not [16]",
    ),
    (
        entry("sparse", (10,)),
        {":values": ("F32", (3,)), ":gaps": ("U8", (2,))},
        "t:gaps: shape [2], not [3]",
    ),
    (
        entry("sparse", (10,)),
        {":values": ("F32", (3,)), ":gaps": ("U32", (3,))},
        "t:gaps: dtype U32, not U8 or U16",
    ),
    (
        entry("int8", (2, 3)),
        {":scale": ("F32", (3,)), ":int8": ("I8", (2, 3))},
        "t:scale: shape [3], not [2]",
    ),
    (
        entry("int8", (2, 3)),
        {":scale": ("F16", (2,)), ":int8": ("U8", (2, 3))},
        "t:int8: dtype U8, not I8",
    ),
    (
        entry("int8", (2, 3)),
        {":int8": ("I8", (2, 3))},
        "t:scale: in the manifest, in no shard",
    ),
    (
        entry("lowrank", (4, 6)),
        {":lora_A": ("F32", (2, 6)), ":lora_B": ("F32", (4, 3))},
        "t:lora_B: shape [4, 3], not [4, 2]",
    ),
    (
        entry("lowrank", (4, 6)),
        {":lora_A": ("F32", ()), ":lora_B": ("F32", (4,))},
        "t:lora_A: shape [], not [6]",
    ),
    (
        entry("lowrank", (4, 6)),
        {":lora_A": ("F32", (6,)), ":lora_B": ("F32", (4, 6))},
        "t:lora_A: shape [6], not [6, 6]",
    ),
    (
        entry("lowrank", (4, 6)),
        {":lora_A": ("I8", (2, 6)), ":lora_B": ("F32", (4, 2))},
        "t:lora_A: dtype I8, not F32 or BF16 or F16",
    ),
]


@pytest.mark.parametrize(("claimed", "claims"), SOUND)
def test_the_parts_that_the_format_names_are_taken(claimed: TensorEntry, claims: Claims) -> None:
    """Each encoding's own, in their shapes and dtypes."""
    assert list(part_problems("t", claimed, table(claims))) == []
    assert {name[1:] for name in part_names("t", claimed, table(claims))} == claims.keys()


@pytest.mark.parametrize(("claimed", "claims", "problem"), FALSE)
def test_other_parts_are_named(claimed: TensorEntry, claims: Claims, problem: str) -> None:
    """Missing, misshapen, too many, of another dtype: said with the part's name."""
    assert problem in list(part_problems("t", claimed, table(claims)))


@pytest.mark.parametrize(("elements", "expected"), [(0, 0), (1, 8), (64, 8), (65, 16), (1000, 128)])
def test_a_bitmap_is_padded_to_eight_bytes(elements: int, expected: int) -> None:
    """What follows it in the file is aligned."""
    assert bitmap_bytes(elements) == expected


def test_no_part_has_a_longer_name_than_is_planned_for() -> None:
    """The room for a shard's header is reckoned by it."""
    longest, _ = longest_part_names("t")
    for claimed, claims in SOUND:
        assert all(len(name) <= len(longest) for name in part_names("t", claimed, table(claims)))
