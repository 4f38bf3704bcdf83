"""vllm_rvec.vector.stored: however a tensor is stored and viewed, the sum is the reference's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.support.placing import SHAPE, VIEWS, assert_same_bits, weights
from tests.support.vectors import store_vector
from vllm_rvec.errors import VectorCorruptError
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.stored import (
    PaddedTensor,
    StoredTensor,
    Team,
    dense,
    fuse_view,
    int8,
    sparse,
    team,
)
from vllm_rvec.vector.stored.tensor import as_array

if TYPE_CHECKING:
    from pathlib import Path

ALPHAS = (0.3, -1.0, 1.0)
KINDS = ("dense", "dense_f32", "gaps", "bitmap", "bitmap_f32", "int8", "lowrank", "padded")


@pytest.fixture(params=["compiled", "without numba"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled loops, and what is done where there are none."""
    if request.param == "without numba":
        for module in (dense, int8, sparse):
            monkeypatch.setattr(module, "compiled_loops", lambda: None)
    return str(request.param)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut tiny tensors where large ones are cut, so that every seam is crossed."""
    monkeypatch.setattr(sparse, "CHUNK_GAPS", 37)
    monkeypatch.setattr(sparse, "CHUNK_WORDS", 3)
    monkeypatch.setattr(team, "SHARED_ELEMENTS", 101)
    monkeypatch.setattr(dense, "LOOP_ELEMENTS", 0)


def values(density: float, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    v = torch.randn(SHAPE, generator=generator) * 0.1
    v[torch.rand(SHAPE, generator=generator) >= density] = 0
    v[:2], v[-3:] = 0, 0  # zeros before the first value, and behind the last
    return v.to(dtype)


def stored(kind: str, folder: Path) -> tuple[StoredTensor, torch.Tensor]:
    """A tensor of a vector that was written and opened, and what it decodes to."""
    encoding, density, dtype = {
        "dense": ("dense", 1.0, torch.bfloat16),
        "dense_f32": ("dense", 1.0, torch.float32),
        "gaps": ("sparse", 0.06, torch.bfloat16),
        "bitmap": ("sparse", 0.4, torch.bfloat16),
        "bitmap_f32": ("sparse", 0.4, torch.float32),
        "int8": ("int8", 1.0, torch.float32),
        "lowrank": ("dense", 1.0, torch.float32),
        "padded": ("sparse", 0.06, torch.bfloat16),
    }[kind]
    tensor: object = values(density, dtype) + (dtype == torch.float32) * 1e-9
    if kind == "bitmap_f32":
        tensor = values(density, dtype) * 1.0001
    if kind == "lowrank":
        generator = torch.Generator().manual_seed(1)
        a, b = (torch.randn(4, 48, generator=generator), torch.randn(67, 4, generator=generator))
        tensor = (a, b, 0.01)
    store_vector(folder, {"w": tensor}, encoding=encoding)  # type: ignore[dict-item]
    found = VectorReader(folder).stored("w")
    assert found is not None
    whole = found.read(0, found.elements).view(SHAPE)
    if kind != "padded":
        return found, whole
    shape = (SHAPE[0] + 9, SHAPE[1])
    return PaddedTensor(found, shape, 0.0), torch.cat((whole, whole.new_zeros(9, SHAPE[1])))


def reference(
    theta: torch.Tensor, terms: list[tuple[torch.Tensor, float]], dtype: torch.dtype
) -> torch.Tensor:
    total = theta.float()
    for v, alpha in terms:
        total = total + torch.tensor(alpha) * v.float()
    return total.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_view_of_every_encoding_gets_the_reference(
    kind: str, dtype: torch.dtype, loops: str, tmp_path: Path
) -> None:
    """Bit for bit, zeros' signs too, for each view a weight loader could take."""
    tensor, decoded = stored(kind, tmp_path / "v")
    theta, two = weights(decoded.shape, dtype), Team(2)
    for alpha in ALPHAS:
        for view in VIEWS.values():
            part = view(theta)
            out = torch.full(part.shape, 5.0, dtype=dtype)
            fuse_view(part, 0, [(tensor, alpha)], out, two)
            assert_same_bits(out, reference(part, [(view(decoded), alpha)], dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_may_have_any_strides_and_dtype(kind: str, loops: str, tmp_path: Path) -> None:
    """Parts of packed parameters, transposed parameters, parameters of a wider dtype."""
    tensor, decoded = stored(kind, tmp_path / "v")
    theta, two = weights(decoded.shape, torch.bfloat16), Team(2)
    rows, columns = decoded.shape
    for dtype in (torch.bfloat16, torch.float32):
        expected = reference(theta, [(decoded, 0.3)], dtype)
        for out in (
            torch.full((rows + 4, columns + 6), 5.0, dtype=dtype)[2:-2, 3:-3],
            torch.full((columns, rows), 5.0, dtype=dtype).t(),
            torch.full((rows, columns, 2), 5.0, dtype=dtype)[..., 1],
        ):
            fuse_view(theta, 0, [(tensor, 0.3)], out, two)
            assert_same_bits(out, expected)


def test_a_window_writes_nothing_beside_itself(loops: str, tmp_path: Path) -> None:
    """What is around a slice of a packed parameter stays."""
    tensor, decoded = stored("int8", tmp_path / "v")
    theta = weights(decoded.shape, torch.bfloat16)
    packed = torch.full((100, 60), 5.0, dtype=torch.bfloat16)
    fuse_view(theta[:, 8:24], 0, [(tensor, 0.3)], packed[20:87, 30:46], Team(1))
    packed[20:87, 30:46] = 5.0
    assert bool((packed == 5.0).all())


def test_several_terms_are_rounded_once(loops: str, tmp_path: Path) -> None:
    """Each product and each sum in float32, in the order given, one rounding at the end."""
    pairs = [stored(kind, tmp_path / kind) for kind in ("gaps", "int8", "dense", "lowrank")]
    alphas = (0.3, -0.7, 1.0, 0.1)
    theta = weights(torch.Size(SHAPE), torch.bfloat16)
    for view in VIEWS.values():
        part = view(theta)
        out = torch.empty(part.shape, dtype=torch.bfloat16)
        terms = [(tensor, alpha) for (tensor, _), alpha in zip(pairs, alphas, strict=True)]
        fuse_view(part, 0, terms, out, Team(2))
        decoded = [(view(v), alpha) for (_, v), alpha in zip(pairs, alphas, strict=True)]
        assert_same_bits(out, reference(part, decoded, torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_any_stretch_decodes_to_the_same_elements(kind: str, loops: str, tmp_path: Path) -> None:
    """Of a tensor that is read in pieces, no element depends on where it was cut."""
    tensor, decoded = stored(kind, tmp_path / "v")
    flat = decoded.reshape(-1)
    for start, stop in ((0, 0), (0, 1), (5, 1000), (90, 97), (3000, flat.numel()), (777, 778)):
        assert_same_bits(tensor.read(start, stop), flat[start:stop])


@pytest.mark.parametrize("kind", KINDS)
def test_any_stretch_is_decoded_elsewhere_to_the_same_elements(
    kind: str, loops: str, tmp_path: Path
) -> None:
    """From copies of what is sent, of no more bytes than the elements have."""
    tensor, decoded = stored(kind, tmp_path / "v")
    flat, end = decoded.reshape(-1), decoded.numel()
    starts = (0, 1, 47, 48, 90, 777, 3100, 3215, 3216, 3217, end - 1)
    for start in starts:
        for count in (0, 1, 7, 48, 191, 1000, end):
            stop = min(start + count, end)
            sent, decode = tensor.compact(start, stop)
            assert all(part.is_contiguous() for part in sent)
            found = decode([part.clone() for part in sent])
            assert_same_bits(found, flat[start:stop])
            assert_same_bits(tensor.read(start, stop), flat[start:stop])


@pytest.mark.parametrize(
    ("kind", "share"), [("gaps", 0.1), ("bitmap", 0.48), ("int8", 0.55), ("dense", 1.0)]
)
def test_what_is_sent_is_as_small_as_what_is_stored(
    kind: str, share: float, tmp_path: Path
) -> None:
    """Of the bytes that the tensor has in bfloat16: here as many values are stored as say so."""
    tensor, decoded = stored(kind, tmp_path / "v")
    for start, stop in ((0, decoded.numel()), (480, 2880)):
        sent, _ = tensor.compact(start, stop)
        assert sum(part.nbytes for part in sent) <= share * (stop - start) * 2


def test_gaps_of_two_bytes_are_decoded_elsewhere(loops: str) -> None:
    """Also those that are no positive numbers of sixteen bits with a sign."""
    gaps = torch.tensor([3, 40_000, 65_535, 32_768, 0], dtype=torch.int32).to(torch.uint16)
    values = torch.tensor([1.0, 2.0, -0.0, 4.0, 5.0]).bfloat16()
    tensor = sparse.GapsTensor("w", (2, 100_000), values, gaps)
    for start, stop in ((0, 200_000), (4, 60_000), (40_004, 40_005), (105_540, 200_000)):
        sent, decode = tensor.compact(start, stop)
        assert_same_bits(decode([part.clone() for part in sent]), tensor.read(start, stop))


@pytest.mark.parametrize("make", [sparse.GapsTensor, sparse.BitmapTensor])
def test_a_sparse_tensor_without_values_is_zeros_everywhere(
    make: type[sparse.GapsTensor | sparse.BitmapTensor],
) -> None:
    """Nothing is sent for it."""
    places = torch.zeros(16 if make is sparse.BitmapTensor else 0, dtype=torch.uint8)
    tensor = make("w", (8, 16), torch.empty(0, dtype=torch.bfloat16), places)
    sent, decode = tensor.compact(3, 100)
    assert sum(part.nbytes for part in sent) == 0
    assert_same_bits(decode([part.clone() for part in sent]), torch.zeros(97).bfloat16())


def test_a_large_tensor_crosses_every_real_seam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the sizes that pieces really have."""
    monkeypatch.undo()
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(1500, 1000, generator=generator).mul_(0.1)
    v[torch.rand(v.shape, generator=generator) > 0.1] = 0
    v = v.bfloat16()
    theta = torch.randn(v.shape, generator=generator).bfloat16()
    for encoding in ("sparse", "int8", "dense"):
        tensor = VectorReader(
            store_vector(tmp_path / encoding, {"w": v}, encoding=encoding)
        ).stored("w")
        assert tensor is not None
        decoded = tensor.read(0, v.numel()).view(v.shape)
        out = fuse_view(theta, 0, [(tensor, 0.3)], torch.empty_like(theta), Team(2))
        assert_same_bits(out, reference(theta, [(decoded, 0.3)], torch.bfloat16))
        for start, stop in ((0, v.numel()), (262_143, 524_290), (123_456, 1_234_567)):
            sent, decode = tensor.compact(start, stop)
            found = decode([part.clone() for part in sent])
            assert_same_bits(found, decoded.reshape(-1)[start:stop])


@pytest.mark.parametrize("kind", ["int8", "gaps", "bitmap", "dense"])
def test_nan_and_infinity_of_a_target_stay_so(kind: str, tmp_path: Path) -> None:
    """Rounding by bits must not make a number of them."""
    tensor, decoded = stored(kind, tmp_path / "v")
    bits = torch.arange(decoded.numel(), dtype=torch.int32).mul(65536 // 3216 + 1).to(torch.int16)
    theta = bits.view(torch.bfloat16).view(decoded.shape)
    out = fuse_view(theta, 0, [(tensor, 0.3)], torch.empty_like(theta), Team(1))
    expected = reference(theta, [(decoded, 0.3)], torch.bfloat16)
    finite = torch.isfinite(expected)
    assert 0 < int((~finite).sum()) < theta.numel()
    assert torch.equal(out[finite], expected[finite])
    assert torch.equal(torch.isnan(out), torch.isnan(expected))
    assert torch.equal(torch.isinf(out), torch.isinf(expected))


@pytest.mark.parametrize("change", ["gaps", "bits"])
def test_parts_that_contradict_each_other_are_refused(change: str, loops: str) -> None:
    """Before anything is written by them."""
    four = torch.ones(4, dtype=torch.bfloat16)
    tensor: StoredTensor
    if change == "gaps":
        tensor = sparse.GapsTensor("w", (8, 16), four, torch.full((4,), 32, dtype=torch.uint8))
    else:
        bitmap = torch.zeros(16, dtype=torch.uint8)
        bitmap[3] = 0x1F
        tensor = sparse.BitmapTensor("w", (8, 16), four, bitmap)
    theta = torch.zeros(8, 16, dtype=torch.bfloat16)
    with pytest.raises(VectorCorruptError, match="'w' of the vector is damaged"):
        fuse_view(theta, 0, [(tensor, 1.0)], torch.empty_like(theta), Team(1))
    with pytest.raises(VectorCorruptError):
        tensor.read(0, 128)


def test_float16_has_no_compiled_loop() -> None:
    """It goes through PyTorch: numba computes nothing in it."""
    assert as_array(torch.zeros(3, dtype=torch.float16)) is None
