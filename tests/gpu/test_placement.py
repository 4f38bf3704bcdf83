"""vllm_rvec.loader.placement on a GPU: the CPU's bits by every way, in little memory of the device.

tests/loader/test_placement.py has the same with the CPU in the GPU's place. vLLM is not needed.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.placing import (
    VIEWS,
    assert_same_bits,
    make_stored,
    outputs,
    stored_bytes,
    weights,
)
from vllm_rvec.loader import placement
from vllm_rvec.loader.fused_tensor import FusedTensor, FuseLedger, Fusion
from vllm_rvec.loader.placement import CHUNK_ELEMENTS, WAYS, FuseOn, Placement, Placer, Way
from vllm_rvec.vector.stored import PaddedTensor, StoredTensor, Team, fuse_view, sparse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

KINDS = ("dense", "dense_f32", "gaps", "bitmap", "int8", "lowrank", "padded")
LARGE = (12_000, 4096)
"""About 100 MB of bfloat16: 24 steps."""


@pytest.fixture(params=WAYS, ids=str)
def way(request: pytest.FixtureRequest) -> Way:
    found: Way = request.param
    return found


@pytest.fixture
def gpu() -> torch.device:
    """The first one."""
    return torch.device("cuda", 0)


@pytest.fixture
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps for each tensor, so that buffers are used again while they are sent."""
    monkeypatch.setattr(placement, "CHUNK_ELEMENTS", 301)
    monkeypatch.setattr(sparse, "CHUNK_GAPS", 37)
    monkeypatch.setattr(sparse, "CHUNK_WORDS", 3)


def on_cpu(
    theta: torch.Tensor, terms: list[tuple[StoredTensor, float]], dtype: torch.dtype
) -> torch.Tensor:
    """Sum straight into a parameter on the CPU, which other tests compare with the formula."""
    return fuse_view(theta, 0, terms, torch.empty(theta.shape, dtype=dtype), Team(1))


@pytest.mark.usefixtures("_small_steps")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_view_of_every_encoding_is_the_cpus(
    kind: str, dtype: torch.dtype, way: Way, gpu: torch.device
) -> None:
    """Bit for bit: no compiler has made one rounding of two. float32 would show it first."""
    tensor, decoded = make_stored(kind)
    theta = weights(decoded.shape, dtype)
    place = Placement(gpu, Team(2), [way])
    for alpha in (0.3, -1.0):
        for view in VIEWS.values():
            part = view(theta)
            out = torch.full(part.shape, 5.0, dtype=dtype, device=gpu)
            place.place(part, 0, [(tensor, alpha)], out)
            assert_same_bits(out, on_cpu(part, [(tensor, alpha)], dtype))


@pytest.mark.usefixtures("_small_steps")
@pytest.mark.parametrize("kind", KINDS)
def test_the_parameter_may_have_any_strides_and_dtype(
    kind: str, way: Way, gpu: torch.device
) -> None:
    """Nothing is written beside a slice of a packed parameter."""
    tensor, decoded = make_stored(kind)
    theta = weights(decoded.shape, torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        for whole, out in outputs(decoded.shape, dtype, gpu):
            Placement(gpu, Team(2), [way]).place(theta, 0, [(tensor, 0.3)], out)
            assert_same_bits(out, on_cpu(theta, [(tensor, 0.3)], dtype))
            out.fill_(5.0)
            assert bool((whole == 5.0).all())


@pytest.mark.usefixtures("_small_steps")
def test_several_terms_are_rounded_once_in_their_order(way: Way, gpu: torch.device) -> None:
    """In float32 on the device too."""
    alphas = {"gaps": 0.3, "int8": -0.7, "dense": 1.0, "lowrank": 0.1}
    terms = [(make_stored(kind)[0], alpha) for kind, alpha in alphas.items()]
    theta = weights(torch.Size(terms[0][0].shape), torch.float32)
    out = Placement(gpu, Team(2), [way]).place(theta, 0, terms, torch.empty_like(theta, device=gpu))
    assert_same_bits(out, on_cpu(theta, terms, torch.float32))


@pytest.mark.usefixtures("_small_steps")
def test_rows_that_only_the_target_has_keep_their_bits(way: Way, gpu: torch.device) -> None:
    """-0.0 plus -0.0 is -0.0 there too."""
    inner, decoded = make_stored("gaps")
    tensor = PaddedTensor(inner, (decoded.shape[0] + 9, decoded.shape[1]), -0.0)
    theta = weights(torch.Size(tensor.shape), torch.bfloat16)
    out = torch.empty_like(theta, device=gpu)
    Placement(gpu, Team(1), [way]).place(theta, 0, [(tensor, 0.3)], out)
    assert_same_bits(out[decoded.shape[0] :], theta[decoded.shape[0] :])


@pytest.mark.parametrize("kind", ["dense", "gaps", "bitmap", "int8", "lowrank"])
def test_a_large_tensor_takes_a_few_steps_of_memory(kind: str, way: Way, gpu: torch.device) -> None:
    """With the sizes that steps really have: less than the tensor, and the same bits."""
    tensor, decoded = make_stored(kind, LARGE)
    theta = weights(decoded.shape, torch.bfloat16)
    out = torch.zeros_like(theta, device=gpu)
    place = Placement(gpu, Team(), [way])
    torch.cuda.synchronize(gpu)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(gpu)
    before = torch.cuda.memory_allocated(gpu)
    place.place(theta, 0, [(tensor, 0.3)], out)
    torch.cuda.synchronize(gpu)
    extra = torch.cuda.max_memory_allocated(gpu) - before
    assert extra <= 20 * CHUNK_ELEMENTS < theta.nbytes
    assert_same_bits(out, on_cpu(theta, [(tensor, 0.3)], torch.bfloat16))


@pytest.mark.parametrize("fuse_on", ["auto", "host", "device"])
def test_a_state_dict_is_fused_alike_in_both_places(fuse_on: FuseOn, gpu: torch.device) -> None:
    """As a weight loader does it, with enough tensors that a way is chosen for each kind."""
    team, ledger = Team(), FuseLedger()
    placer = Placer(team, fuse_on)
    shape = (1100, 1000)
    for number in range(9):
        for kind in ("dense", "gaps", "int8"):
            tensor, decoded = make_stored(kind, shape, seed=number)
            theta = weights(decoded.shape, torch.bfloat16)
            fusion = Fusion(((tensor, 0.3),), 0, torch.bfloat16, ledger, team, placer)
            lazy = FusedTensor(theta, fusion)
            packed = torch.zeros(shape[0] + 100, 500, dtype=torch.bfloat16, device=gpu)
            packed[50:-50].copy_(lazy.narrow(1, 250, 500))
            whole = torch.empty_like(theta, device=gpu).copy_(lazy)
            expected = on_cpu(theta, [(tensor, 0.3)], torch.bfloat16)
            assert_same_bits(whole, expected)
            assert_same_bits(packed[50:-50], expected[:, 250:750])
            assert not packed[:50].any()
            assert not packed[-50:].any()
    assert not ledger.materialized
    placer.finish()
    where = ("host", "device") if fuse_on == "auto" else (fuse_on,)
    kinds = [line.split(": ") for line in placer.summary().split("; ")]
    assert {kind for kind, _ in kinds} == {
        *("dense", "gaps", "int8"),
        *("dense in slices", "gaps in slices", "int8 in slices"),
    }
    assert all(way.startswith(where) for _, way in kinds)


def test_weights_that_were_streamed_to_the_device_stay_there(gpu: torch.device) -> None:
    """Only v crosses the bus; a parameter on the CPU, or a computed sum, gets the same bits."""
    team = Team()
    placer = Placer(team, "auto")
    assert placer.adds_on(gpu)
    for kind in ("dense", "gaps", "int8"):
        tensor, decoded = make_stored(kind, (1100, 1000))
        theta = weights(decoded.shape, torch.bfloat16)
        expected = on_cpu(theta, [(tensor, 0.3)], torch.bfloat16)
        fusion = Fusion(((tensor, 0.3),), 0, torch.bfloat16, FuseLedger(), team, placer)
        lazy = FusedTensor(theta.to(gpu), fusion)
        assert lazy.device == gpu
        before = placer.on(gpu).sent_bytes
        assert_same_bits(torch.empty_like(theta, device=gpu).copy_(lazy), expected)
        assert placer.on(gpu).sent_bytes - before <= stored_bytes(tensor) + 4 * 1100
        assert_same_bits(torch.empty_like(theta).copy_(lazy), expected)
        computed = lazy + 0
        assert computed.device == gpu
        assert_same_bits(computed, expected + 0)


def test_the_sum_is_there_for_what_is_enqueued_next(gpu: torch.device) -> None:
    """On the current stream, whichever that is, without waiting in between."""
    tensor, decoded = make_stored("dense", (1100, 1000))
    theta = weights(decoded.shape, torch.bfloat16)
    expected = on_cpu(theta, [(tensor, 0.3)], torch.bfloat16)
    side = torch.cuda.Stream(gpu)
    for way in WAYS:
        place = Placement(gpu, Team(1), [way])
        with torch.cuda.stream(side):
            outs = [torch.empty_like(theta, device=gpu) for _ in range(8)]
            copies = [place.place(theta, 0, [(tensor, 0.3)], out).clone() for out in outs]
        side.synchronize()
        for copy in copies:
            assert_same_bits(copy, expected)
