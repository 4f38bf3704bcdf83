"""vllm_rvec.vector.encodings: what is encoded, written and read comes back."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.support.tiny_vectors import write_vector
from vllm_rvec.checkpoint.dtypes import TORCH_DTYPES
from vllm_rvec.errors import ConfigError
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.encodings import Choice, Encoded, Source, encode, lowrank, source
from vllm_rvec.vector.encodings.parts import in_memory
from vllm_rvec.vector.layout import LORA_A, LORA_B
from vllm_rvec.vector.verification import verify

if TYPE_CHECKING:
    from vllm_rvec.vector.manifest import TensorEntry

Array = npt.NDArray[np.float32]

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9)
ANY_FLOAT = st.floats(width=32, allow_nan=False, allow_infinity=False)
"""Subnormal numbers, both zeros and the largest among them."""
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
BLOCKS = st.sampled_from([1, 7, 64, 1 << 17])
"""Elements of a block: from one row at a time to all at once."""

quick = settings(max_examples=60)


@st.composite
def arrays(draw: st.DrawFn, elements: st.SearchStrategy[float] = ANY_FLOAT) -> Array:
    """Draw a float32 array of any shape and density."""
    array = draw(hnp.arrays(np.float32, SHAPES, elements=elements))
    density = draw(st.sampled_from([0.0, 0.02, 0.2, 0.9, 1.0]))
    seed = draw(st.integers(0, 2**32 - 1))
    kept = np.random.default_rng(seed).random(array.shape) < density
    return np.where(kept, array, np.float32(0)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that was encoded, written, verified and read."""

    entry: TensorEntry
    tensor: torch.Tensor
    """Decoded; zeros where there is none."""
    parts: dict[str, torch.Tensor]
    """What the shards hold of it, by suffix."""

    @property
    def size_bytes(self) -> int:
        """How much its parts take."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())


def store(array: Array, choice: Choice, block_elements: int = 1 << 17) -> Stored:
    tensor = torch.from_numpy(array)
    with mock.patch.object(source, "BLOCK_ELEMENTS", block_elements):
        return store_encoded(array, encode(Source.of(tensor), choice))


def store_encoded(array: Array, encoded: Encoded) -> Stored:
    with tempfile.TemporaryDirectory() as folder:
        path = write_vector(
            Path(folder) / "v",
            {"t": (array.shape, encoded)},
            squared_norms={"t": float(np.square(array.astype(np.float64)).sum())},
        )
        vector = VectorReader(path)
        verify(vector, remembered=False)
        entry, found = vector.manifest.tensors["t"], vector.tensor("t")
        parts = {part[1:]: vector.part(part).clone() for part in vector.table}
    if found is None:
        found = torch.zeros(array.shape, dtype=TORCH_DTYPES[entry.dtype])
    assert tuple(found.shape) == array.shape
    return Stored(entry, found.clone(), parts)


def relative_error(array: Array, found: torch.Tensor) -> float:
    """Compute the relative Frobenius error by numpy, in float64."""
    exact = array.astype(np.float64)
    norm = math.sqrt(np.square(exact).sum())
    wrong = math.sqrt(np.square(exact - found.double().numpy()).sum())
    return wrong / norm if norm else 0.0


@quick
@given(arrays(), st.sampled_from(["auto", "sparse", "dense"]), DTYPES, BLOCKS)
def test_a_lossless_encoding_gives_every_element_back(
    array: Array, encoding: str, dtype: torch.dtype, block_elements: int
) -> None:
    """Whatever shape, density and values: what the tensor is in the dtype that was asked for."""
    expected = torch.from_numpy(array).to(dtype)
    assume(bool(torch.isfinite(expected).all()))  # extract refuses what overflows
    found = store(array, Choice(encoding, dtype), block_elements)
    assert torch.equal(found.tensor.float(), expected.float())
    if dtype == torch.float32:
        assert found.entry.error == 0


@quick
@given(arrays(), DTYPES)
def test_a_dense_tensor_keeps_every_bit(array: Array, dtype: torch.dtype) -> None:
    """The sign of a zero too, unless all of the tensor is zero."""
    expected = torch.from_numpy(array).to(dtype)
    assume(bool(torch.isfinite(expected).all()) and bool(expected.any()))
    found = store(array, Choice("dense", dtype)).tensor
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found.view(bits), expected.view(bits))


@quick
@given(arrays(), DTYPES, BLOCKS)
def test_auto_is_lossless_and_never_larger_than_dense(
    array: Array, dtype: torch.dtype, block_elements: int
) -> None:
    """In what its parts take in the file; and it is never one of the lossy encodings."""
    expected = torch.from_numpy(array).to(dtype)
    assume(bool(torch.isfinite(expected).all()))
    found = store(array, Choice("auto", dtype), block_elements)
    assert found.entry.encoding in {"zero", "dense", "sparse"}
    assert found.size_bytes <= array.size * dtype.itemsize


@quick
@given(arrays(), st.sampled_from(["auto", "sparse", "int8"]), BLOCKS)
def test_the_size_of_blocks_changes_nothing(
    array: Array, encoding: str, block_elements: int
) -> None:
    """Read row by row or all at once, the parts are the same, byte for byte."""
    whole, cut = store(array, Choice(encoding)), store(array, Choice(encoding), block_elements)
    assert whole.parts.keys() == cut.parts.keys()
    assert all(torch.equal(whole.parts[suffix], part) for suffix, part in cut.parts.items())


@quick
@given(arrays(), BLOCKS)
def test_int8_is_off_by_half_a_step_at_most(array: Array, block_elements: int) -> None:
    """A step is the row's scale; subnormal rows and the largest floats are no exception."""
    found = store(array, Choice("int8"), block_elements)
    if found.entry.encoding != "int8":
        assert array.ndim < 2 or not array.any()
        return
    steps = found.parts[":scale"].double().numpy()[:, None]
    wrong = np.abs(array.reshape(len(steps), -1).astype(np.float64) - _rows(found.tensor, steps))
    # One part in a million for the roundings of float32 themselves.
    assert (wrong <= steps * (0.5 + 127e-6)).all()


def _rows(tensor: torch.Tensor, steps: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return tensor.double().numpy().reshape(len(steps), -1)


@quick
@given(
    arrays(),
    st.sampled_from(["auto", "dense", "sparse", "int8"]),
    DTYPES,
    BLOCKS,
)
def test_the_error_in_the_manifest_is_the_relative_frobenius_error(
    array: Array, encoding: str, dtype: torch.dtype, block_elements: int
) -> None:
    """Computed here from what was read back; norm is that of what was read back."""
    assume(bool(torch.isfinite(torch.from_numpy(array).to(dtype)).all()))
    found = store(array, Choice(encoding, dtype), block_elements)
    expected = relative_error(array, found.tensor)
    assert found.entry.error == pytest.approx(expected, rel=1e-3, abs=1e-12)
    norm = math.sqrt(np.square(found.tensor.double().numpy()).sum())
    assert found.entry.norm == pytest.approx(norm, rel=1e-4)


MODEST = st.floats(width=32, min_value=-1e3, max_value=1e3)


@quick
@given(
    hnp.arrays(np.float32, (2, 9), elements=MODEST),
    hnp.arrays(np.float32, (12, 2), elements=MODEST),
    st.floats(-4, 4),
    st.sampled_from([1, 30, 1 << 20]),
)
def test_lowrank_decodes_to_the_float64_product(
    lora_a: Array, lora_b: Array, scaling: float, product_elements: int
) -> None:
    """Rounded once to float32, whatever is multiplied at a time."""
    parts = in_memory(LORA_A, torch.from_numpy(lora_a)), in_memory(LORA_B, torch.from_numpy(lora_b))
    exact = scaling * (lora_b.astype(np.float64) @ lora_a.astype(np.float64))
    with mock.patch.object(lowrank, "PRODUCT_ELEMENTS", product_elements):
        found = store_encoded(
            exact.astype(np.float32), Encoded("lowrank", "F32", parts, scaling=scaling)
        )
    # The order of a sum of two products is free, and they may cancel: a float64 unit of the terms.
    terms = abs(scaling) * (np.abs(lora_b).astype(np.float64) @ np.abs(lora_a).astype(np.float64))
    wrong = np.abs(found.tensor.double().numpy() - exact)
    assert (wrong <= np.abs(exact) * 2.0**-24 + terms * 2.0**-51 + 2.0**-149).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_of_lowrank_is_that_of_what_is_stored(dtype: torch.dtype) -> None:
    """Cutting the rank and rounding the factors are both in it; at full rank little is left."""
    rng = np.random.default_rng(0)
    matrix = (rng.normal(size=(40, 3)) @ rng.normal(size=(3, 30))).astype(np.float32)
    errors = {}
    for rank in (1, 3):
        found = store(matrix, Choice("lowrank", dtype, rank))
        assert found.entry.encoding == "lowrank"
        assert found.parts[":lora_A"].dtype == dtype
        errors[rank] = relative_error(matrix, found.tensor)
        assert found.entry.error == pytest.approx(errors[rank], rel=1e-3, abs=1e-9)
    assert errors[1] > 0.1
    assert errors[3] < (1e-6 if dtype == torch.float32 else 1e-2)


def test_rows_of_the_largest_and_the_smallest_floats_survive_int8() -> None:
    """127 steps of the largest float's 127th are no infinity; a subnormal row is not cut off."""
    top, tiny = float(np.finfo(np.float32).max), 2.0**-149
    array = np.array([[top, -top], [190 * tiny, 100 * tiny], [tiny, 0]], dtype=np.float32)
    found = store(array, Choice("int8")).tensor
    assert torch.isfinite(found).all()
    assert found[0, 0] == pytest.approx(top, rel=1e-6)
    assert found[1].tolist() == [190 * tiny, 100 * tiny]
    assert found[2].tolist() == [tiny, 0]


def test_what_can_not_be_lossy_is_stored_as_auto_does() -> None:
    """int8 of a bias, lowrank of a bias or of a matrix too small for the rank: nothing is lost."""
    bias = np.array([0.1, 0.2, 0.3], dtype=np.float32)
    assert store(bias, Choice("int8")).entry.encoding == "dense"
    assert store(bias, Choice("lowrank")).entry.encoding == "dense"
    assert store(np.full((4, 4), 0.1, np.float32), Choice("lowrank")).entry.encoding == "dense"


def test_values_that_bfloat16_holds_are_stored_in_it() -> None:
    """Auto halves a float32 tensor that loses nothing by it; dense does as it is told."""
    array = np.arange(1, 9, dtype=np.float32)
    assert store(array, Choice("auto")).entry.dtype == "BF16"
    assert store(array, Choice("dense")).entry.dtype == "F32"


@pytest.mark.parametrize(("encoding", "rank"), [("magic", 16), ("lowrank", 0), ("lowrank", -1)])
def test_a_choice_that_can_not_be_is_refused(encoding: str, rank: int) -> None:
    """An error of ours, before anything is read."""
    with pytest.raises(ConfigError):
        Choice(encoding, rank=rank)
