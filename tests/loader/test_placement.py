"""vllm_rvec.loader.placement: every way to a device gives the reference; the fastest is taken.

The CPU stands for the device here: the same copies, kernels and seams. tests/gpu/ has the same on a
GPU.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.placing import (
    SHAPE,
    VIEWS,
    assert_same_bits,
    make_stored,
    outputs,
    stored_bytes,
    weights,
)
from vllm_rvec.errors import VectorCorruptError
from vllm_rvec.loader import placement
from vllm_rvec.loader.fused_tensor import FusedTensor, FuseLedger, Fusion
from vllm_rvec.loader.placement import WAYS, Choice, Placement, Placer, Way, ways_to
from vllm_rvec.loader.staging import BUFFERS, Staging
from vllm_rvec.vector.stored import PaddedTensor, Team, fuse_view, sparse
from vllm_rvec.vector.stored.dense import DenseTensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_rvec.vector.stored import StoredTensor

CPU = torch.device("cpu")
KINDS = ("dense", "dense_f32", "gaps", "bitmap", "int8", "lowrank", "padded")


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps for each tensor, cut along every axis."""
    monkeypatch.setattr(placement, "CHUNK_ELEMENTS", 301)
    monkeypatch.setattr(sparse, "CHUNK_GAPS", 37)
    monkeypatch.setattr(sparse, "CHUNK_WORDS", 3)


@pytest.fixture(params=WAYS, ids=str)
def way(request: pytest.FixtureRequest) -> Way:
    found: Way = request.param
    return found


def placed(way: Way) -> Placement:
    return Placement(CPU, Team(2), [way])


def reference(
    theta: torch.Tensor, terms: Sequence[tuple[torch.Tensor, float]], dtype: torch.dtype
) -> torch.Tensor:
    """The formula, written out."""
    total = theta.float()
    for v, alpha in terms:
        total = total + torch.tensor(alpha, dtype=torch.float32) * v.float()
    return total.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_view_of_every_encoding_gets_the_reference(
    kind: str, dtype: torch.dtype, way: Way
) -> None:
    """Bit for bit, zeros' signs too, for each view a weight loader could take."""
    tensor, decoded = make_stored(kind)
    theta, place = weights(decoded.shape, dtype), placed(way)
    for alpha, view in itertools.product((0.3, -1.0), VIEWS.values()):
        part = view(theta)
        out = torch.full(part.shape, 5.0, dtype=dtype)
        place.place(part, 0, [(tensor, alpha)], out)
        assert_same_bits(out, reference(part, [(view(decoded), alpha)], dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_the_parameter_may_have_any_strides_and_dtype(kind: str, way: Way) -> None:
    """Slices of packed parameters, transposed ones, those of a wider dtype; nothing beside them."""
    tensor, decoded = make_stored(kind)
    theta = weights(decoded.shape, torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        for whole, out in outputs(decoded.shape, dtype, CPU):
            placed(way).place(theta, 0, [(tensor, 0.3)], out)
            assert_same_bits(out, reference(theta, [(decoded, 0.3)], dtype))
            out.fill_(5.0)
            assert bool((whole == 5.0).all())


def test_several_terms_are_rounded_once_in_their_order(way: Way) -> None:
    """Sums in float32; the other order gives other bits, so that it would be seen."""
    pairs = [make_stored(kind) for kind in ("gaps", "int8", "dense", "lowrank")]
    alphas = (0.3, -0.7, 1.0, 0.1)
    theta, place = weights(torch.Size(SHAPE), torch.float32), placed(way)
    terms = [(tensor, alpha) for (tensor, _), alpha in zip(pairs, alphas, strict=True)]
    for view in VIEWS.values():
        part = view(theta)
        out = torch.empty(part.shape, dtype=torch.float32)
        place.place(part, 0, terms, out)
        decoded = [(view(v), alpha) for (_, v), alpha in zip(pairs, alphas, strict=True)]
        assert_same_bits(out, reference(part, decoded, torch.float32))
    backwards = place.place(theta, 0, terms[::-1], torch.empty_like(theta))
    assert not torch.equal(backwards, reference(theta, decoded_all(pairs, alphas), torch.float32))


def decoded_all(
    pairs: Sequence[tuple[StoredTensor, torch.Tensor]], alphas: Sequence[float]
) -> list[tuple[torch.Tensor, float]]:
    return [(v, alpha) for (_, v), alpha in zip(pairs, alphas, strict=True)]


def test_theta_may_begin_anywhere_in_its_storage(way: Way) -> None:
    """As tensors of a checkpoint that is mapped whole do."""
    tensor, decoded = make_stored("gaps")
    storage = weights(torch.Size([decoded.numel() + 100]), torch.bfloat16)
    theta = storage[64 : 64 + decoded.numel()].view(decoded.shape)
    out = torch.empty(30, 48, dtype=torch.bfloat16)
    placed(way).place(theta[20:50], 64, [(tensor, 0.3)], out)
    assert_same_bits(out, reference(theta[20:50], [(decoded[20:50], 0.3)], torch.bfloat16))


def test_a_sum_of_nothing_is_theta(way: Way) -> None:
    """Its bits, -0.0 too: a bias that became zeros has no terms."""
    theta = weights(torch.Size(SHAPE), torch.bfloat16)
    out = placed(way).place(theta, 0, [], torch.empty_like(theta))
    assert_same_bits(out, theta)


def test_rows_that_only_the_target_has_keep_their_bits(way: Way) -> None:
    """The padding's zeros have a sign that changes nothing."""
    inner, decoded = make_stored("gaps")
    tensor = PaddedTensor(inner, (SHAPE[0] + 9, SHAPE[1]), -0.0)
    theta = weights(torch.Size(tensor.shape), torch.bfloat16)
    out = placed(way).place(theta, 0, [(tensor, 0.3)], torch.empty_like(theta))
    assert_same_bits(out[SHAPE[0] :], theta[SHAPE[0] :])
    assert_same_bits(out[: SHAPE[0]], reference(theta[: SHAPE[0]], [(decoded, 0.3)], theta.dtype))


def test_what_is_stored_stays_as_it_is(way: Way) -> None:
    """Also where v is float32 and nothing has to be widened."""
    v, theta = torch.ones(40, 20), torch.ones(40, 20)
    placed(way).place(theta, 0, [(DenseTensor(v), 0.5)], torch.empty(40, 20))
    assert bool((v == 1).all())
    assert bool((theta == 1).all())


def test_a_damaged_vector_is_refused(way: Way) -> None:
    """Whatever way it would have gone."""
    four, gaps = torch.ones(4).bfloat16(), torch.full((4,), 32, dtype=torch.uint8)
    tensor = sparse.GapsTensor("w", (8, 16), four, gaps)
    theta = torch.zeros(8, 16)
    with pytest.raises(VectorCorruptError, match="'w' of the vector is damaged"):
        placed(way).place(theta, 0, [(tensor, 1.0)], torch.empty_like(theta))


def test_a_contracted_sum_would_be_seen() -> None:
    """The weights of these tests tell two roundings from one, as a fused multiply-add gives it."""
    _, decoded = make_stored("dense_f32")
    theta = weights(decoded.shape, torch.float32)
    once = (theta.double() + torch.tensor(0.3).double() * decoded.double()).float()
    assert not torch.equal(once, reference(theta, [(decoded, 0.3)], torch.float32))


def sent_bytes(way: Way, kind: str, rows: slice, columns: slice) -> int:
    tensor, decoded = make_stored(kind)
    theta, place = weights(decoded.shape, torch.bfloat16), placed(way)
    part = theta[rows, columns]
    place.place(part, 0, [(tensor, 0.3)], torch.empty(part.shape, dtype=part.dtype))
    return place.sent_bytes


def test_only_what_must_move_is_sent() -> None:
    """On the host the parameter; on the device theta and what is stored, of a rank's own slice."""
    host, device = WAYS[:2]
    own = 20 * 48 * 2
    assert sent_bytes(host, "dense", slice(10, 30), slice(None)) == own
    assert sent_bytes(device, "dense", slice(10, 30), slice(None)) == 2 * own
    assert sent_bytes(device, "int8", slice(10, 30), slice(None)) <= own + own // 2 + 4 * 30
    assert sent_bytes(device, "gaps", slice(10, 30), slice(None)) <= own * 1.2
    columns = 67 * 12 * 2
    assert sent_bytes(host, "int8", slice(None), slice(12, 24)) == columns
    assert sent_bytes(device, "dense", slice(None), slice(12, 24)) == 2 * columns


def test_no_step_is_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """So memory does not grow with a tensor: along any axis, in any order of them."""
    seen: list[int] = []

    def noted(view: torch.Tensor, *rest: object, **more: object) -> torch.Tensor:
        seen.append(view.numel())
        return fuse_view(view, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(placement, "fuse_view", noted)
    tensor, decoded = make_stored("dense")
    theta = weights(decoded.shape, torch.bfloat16)
    for view in VIEWS.values():
        seen.clear()
        part = view(theta)
        placed(WAYS[0]).place(part, 0, [(tensor, 1.0)], torch.empty(part.shape))
        assert sum(seen) == part.numel()
        assert max(seen, default=0) <= 301
    monkeypatch.setattr(placement, "CHUNK_ELEMENTS", 20)  # less than a row
    seen.clear()
    placed(WAYS[0]).place(theta, 0, [(tensor, 1.0)], torch.empty(theta.shape))
    assert set(seen) == {20, 8}


class Memory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation."""
        found = func(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if is_tensor(t)}
        for tensor in tree_leaves(found):
            if is_tensor(tensor) and (key := tensor.untyped_storage().data_ptr()) not in old:
                self._count(tensor.untyped_storage(), key)
        return found

    def _count(self, storage: torch.UntypedStorage, key: int) -> None:
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@pytest.mark.parametrize("kind", ["dense", "gaps", "bitmap", "int8", "padded"])
def test_memory_does_not_grow_with_the_tensor(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum on the device needs a few numbers for each element of a step, and no more."""
    monkeypatch.setattr(placement, "CHUNK_ELEMENTS", 4096)
    tensor, decoded = make_stored(kind, (500, 512))
    theta = weights(decoded.shape, torch.bfloat16)
    place, out = placed(WAYS[1]), torch.empty_like(theta)
    place.place(theta, 0, [(tensor, 0.3)], out)  # makes the buffers
    with Memory() as memory:
        place.place(theta, 0, [(tensor, 0.3)], out)
    assert 4096 * 4 <= memory.peak <= 4096 * 12 < theta.nbytes


def test_buffers_take_turns_and_are_as_large_as_what_they_carried() -> None:
    """Few, whatever is sent; each grows alone."""
    staging = Staging(CPU, is_pinned=True)
    out = torch.zeros(1000)
    for number in range(10):
        staging.fill(out, lambda staged, number=number: staged.fill_(number))  # type: ignore[misc]
        assert bool((out == number).all())
    buffers = staging._buffers
    assert len(buffers) == BUFFERS
    assert {buffer.nbytes for buffer in buffers if buffer is not None} == {4000}
    one, two = staging.send([torch.arange(5).t(), torch.ones(3, 2).t()])
    assert torch.equal(one, torch.arange(5))
    assert torch.equal(two, torch.ones(2, 3))
    assert two.is_contiguous()
    assert staging.sent_bytes == 10 * 4000 + 40 + 24


class Clock:
    """A clock that each way moves by its own time."""

    def __init__(self, seconds: dict[Way, float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.taken = 0.0, list[Way]()
        add = Placement._add

        def timed(placement: Placement, way: Way, *rest: object) -> None:
            add(placement, way, *rest)  # type: ignore[arg-type]
            self.now += seconds[way]
            self.taken.append(way)

        monkeypatch.setattr(Placement, "_add", timed)

    def __call__(self) -> float:
        """Tell the time."""
        return self.now


@pytest.mark.parametrize("fastest", WAYS, ids=str)
def test_the_fastest_way_is_found_and_kept(fastest: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is taken twice, in turn; the faster of both counts, then the fastest way is taken."""
    monkeypatch.setattr(placement, "MEASURED_ELEMENTS", 1000)
    clock = Clock({way: 1.0 if way == fastest else 2.0 for way in WAYS}, monkeypatch)
    place = Placement(CPU, Team(1), WAYS, clock)
    tensor, decoded = make_stored("dense")
    theta = weights(decoded.shape, torch.bfloat16)
    for _ in range(20):
        place.place(theta, 0, [(tensor, 0.3)], torch.empty_like(theta))
    assert clock.taken == [*WAYS, *WAYS] + [fastest] * 12
    assert place.chosen == {"dense": fastest}


def test_each_kind_of_tensor_has_a_choice_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encodings, several of them, slices: what is fast for one need not be for another."""
    monkeypatch.setattr(placement, "MEASURED_ELEMENTS", 1000)
    place = Placement(CPU, Team(1), WAYS)
    for kind in ("dense", "int8"):
        tensor, decoded = make_stored(kind)
        theta = weights(decoded.shape, torch.bfloat16)
        place.place(theta, 0, [(tensor, 0.3)], torch.empty_like(theta))
        place.place(theta[:, :24], 0, [(tensor, 0.3)], torch.empty(67, 24))
        place.place(theta, 0, [(tensor, 0.3), (tensor, 1.0)], torch.empty_like(theta))
    assert set(place.chosen) == {
        *("dense", "dense in slices", "dense + dense"),
        *("int8", "int8 in slices", "int8 + int8"),
    }


def test_small_tensors_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take the best way known so far."""
    clock = Clock(dict.fromkeys(WAYS, 1.0), monkeypatch)
    place = Placement(CPU, Team(1), WAYS, clock)
    tensor, decoded = make_stored("dense")
    theta = weights(decoded.shape, torch.bfloat16)
    for _ in range(5):
        place.place(theta, 0, [(tensor, 0.3)], torch.empty_like(theta))
    assert clock.taken == [WAYS[0]] * 5


def test_a_slow_first_round_is_forgiven() -> None:
    """It makes the buffers."""
    one, two = WAYS[:2]
    choice = Choice([one, two])
    for way, seconds in ((one, 9.0), (two, 2.0), (one, 1.0), (two, 2.0)):
        assert choice.next == way
        choice.note(way, seconds)
    assert choice.next is None
    assert choice.best == one


def test_what_the_user_asks_for_is_done() -> None:
    """Nothing is added on a device that is no GPU of PyTorch's unless it is asked for."""
    gpu, other = torch.device("cuda", 0), torch.device("xpu", 0)
    assert ways_to(gpu, "auto") == WAYS
    assert {way.where for way in ways_to(other, "auto")} == {"host"}
    for device, where in itertools.product((gpu, other), ("host", "device")):
        assert {way.where for way in ways_to(device, where)} == {where}  # type: ignore[arg-type]
    assert [Placer(Team(1), on).adds_on(gpu) for on in ("auto", "host", "device")] == [
        *(True, False, True)
    ]


def test_weights_that_are_on_the_device_stay_there() -> None:
    """Only v moves; the meta device stands for the GPU, as it computes nothing and has no host."""
    theta = torch.zeros(SHAPE, dtype=torch.bfloat16, device="meta")
    tensor, _ = make_stored("dense")
    place = Placement(theta.device, Team(1), WAYS)
    place.place(theta, 0, [(tensor, 0.3)], torch.empty_like(theta))
    assert place.sent_bytes == stored_bytes(tensor)
    (kind,) = place.chosen
    assert kind == "dense onto weights that are there"
    assert place.chosen[kind].where == "device"


def test_the_log_says_which_ways_were_taken() -> None:
    """After the load, when the buffers are gone."""
    team = Team(1)
    placer = Placer(team, "device")
    tensor, decoded = make_stored("dense")
    theta = weights(decoded.shape, torch.bfloat16)
    fusion = Fusion(((tensor, 0.3),), 0, torch.bfloat16, FuseLedger(), team, placer)
    assert placer.summary() == ""
    out = torch.empty_like(theta).copy_(FusedTensor(theta, fusion))
    assert placer.summary() == "", "the CPU needs no placement"
    placer.on(CPU).place(theta, 0, fusion.terms, out)
    placer.finish()
    assert placer.summary() == "dense: device, pinned"
    placer.finish()
    assert placer.summary() == "dense: device, pinned"
