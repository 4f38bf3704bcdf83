"""The stored bytes of format version 1: what was written stays readable, and is written again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.golden.make import FOLDER
from tests.support.tiny_vectors import EXAMPLES, example, write_vector
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.verification import verify

if TYPE_CHECKING:
    from pathlib import Path

NAME = "model.layers.0.weight"


def at(size: int, values: dict[int, float]) -> list[float]:
    return [values.get(place, 0.0) for place in range(size)]


# By hand: from the tensors in tests/support/tiny_vectors.py and FORMAT.md, not by any code of ours.
EXPECTED: dict[str, tuple[torch.dtype, list[float] | list[list[float]]]] = {
    "dense_f32": (torch.float32, [[1.5, -2.0, 0.1], [-0.0, 1e-3, 3.0]]),
    # bfloat16 keeps 8 bits: 0.1 is 205/2048, 1e-3 is 131/131072.
    "dense_bf16": (torch.bfloat16, [[1.5, -2.0, 205 / 2048], [-0.0, 131 / 131072, 3.0]]),
    # float16 keeps 11 bits: 0.1 is 1638/16384, 1e-3 is 1049/1048576.
    "dense_f16": (torch.float16, [[1.5, -2.0, 1638 / 16384], [-0.0, 1049 / 1048576, 3.0]]),
    "sparse_bitmap": (torch.float32, [[0.0, 0.1, 0.0, -0.2, 0.0], [0.3, 0.0, 0.0, 0.0, 1e-42]]),
    "sparse_gaps_u8": (
        torch.float32,
        at(310, {0: 0.1, 1: 0.2, 2: 0.1 * 3, 3: 0.4, 4: 0.5, 300: 0.1 * 6}),
    ),
    "sparse_gaps_u16": (torch.float32, at(2000, {7: 0.1, 1500: 0.2})),
    # Scales 1 and 1/254: 0.4 becomes 0; 0.25 is 63.5 steps of 1/254, and the even 64 of them.
    "int8": (
        torch.float32,
        [[127.0, -1.0, 0.0], [0.0, 0.0, 0.0], [127 / 254, 64 / 254, -127 / 254]],
    ),
    # 0.5 * [[3, 1], [-1, 0.5]] @ [[1, -2, 0.5], [0.25, 0, 4]]
    "lowrank": (torch.float32, [[1.625, -3.0, 2.75], [-0.4375, 1.0, 0.75]]),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_golden_vector_decodes_to_its_pinned_values(name: str) -> None:
    """What format version 1 says of each encoding, on files whose bytes are pinned."""
    vector = VectorReader(FOLDER / name)
    verify(vector, remembered=False)
    tensor = vector.tensor(NAME)
    if name == "zero":
        assert tensor is None
        assert vector.manifest.tensors[NAME].norm == 0
        return
    dtype, values = EXPECTED[name]
    assert tensor is not None
    assert tensor.dtype == dtype
    expected = torch.tensor(values, dtype=torch.float64)
    assert tensor.shape == expected.shape
    assert vector.manifest.tensors[NAME].norm == pytest.approx(float(expected.norm()), rel=1e-3)
    if name in {"int8", "sparse_gaps_u8"}:  # decimals that float32 rounds more than once
        assert torch.allclose(tensor.double(), expected, rtol=2e-7, atol=0)
    else:
        assert torch.equal(tensor, expected.to(dtype))


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_writer_makes_the_golden_bytes_again(name: str, tmp_path: Path) -> None:
    """The same tensors give the same files, manifest included, byte for byte."""
    made = write_vector(tmp_path / name, {NAME: example(name)})
    golden = {path.name: path.read_bytes() for path in (FOLDER / name).iterdir()}
    assert {path.name: path.read_bytes() for path in made.iterdir()} == golden


def test_each_golden_vector_is_stored_as_its_name_says() -> None:
    """The nine files cover every encoding, every dtype, and both ways to place sparse values."""
    found = {}
    for name in EXAMPLES:
        vector = VectorReader(FOLDER / name)
        entry = vector.manifest.tensors[NAME]
        parts = {part.removeprefix(NAME): info.dtype for part, info in vector.table.items()}
        found[name] = entry.encoding, entry.dtype, parts
    assert found == {
        "dense_f32": ("dense", "F32", {"": "F32"}),
        "dense_bf16": ("dense", "BF16", {"": "BF16"}),
        "dense_f16": ("dense", "F16", {"": "F16"}),
        "zero": ("zero", "F32", {}),
        "sparse_bitmap": ("sparse", "F32", {":values": "F32", ":bitmap": "U8"}),
        "sparse_gaps_u8": ("sparse", "F32", {":values": "F32", ":gaps": "U8"}),
        "sparse_gaps_u16": ("sparse", "F32", {":values": "F32", ":gaps": "U16"}),
        "int8": ("int8", "F32", {":scale": "F32", ":int8": "I8"}),
        "lowrank": ("lowrank", "F32", {":lora_A": "F32", ":lora_B": "F32"}),
    }
