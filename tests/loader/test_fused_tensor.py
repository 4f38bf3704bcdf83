"""vllm_rvec.loader.fused_tensor: lazy where it may be, computed where it must be, never wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vllm_rvec.loader.fused_tensor import FusedTensor, FuseLedger, Fusion
from vllm_rvec.loader.placement import Placer
from vllm_rvec.vector.stored import Team
from vllm_rvec.vector.stored.dense import DenseTensor

ALPHA = 0.3
Operation = Callable[[torch.Tensor], torch.Tensor]


def pair(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[FusedTensor, torch.Tensor]:
    """A lazy sum, and the same sum computed by the reference formula."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(shape, generator=generator).to(dtype)
    v = (torch.randn(shape, generator=generator) * 0.1).to(dtype)
    team = Team(1)
    fusion = Fusion(((DenseTensor(v), ALPHA),), 0, dtype, FuseLedger(), team, Placer(team))
    return FusedTensor(theta, fusion), reference(theta, v, dtype)


def reference(theta: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (theta.float() + torch.tensor(ALPHA) * v.float()).to(dtype)


def ledger(tensor: FusedTensor) -> FuseLedger:
    return tensor._fusion.ledger


LAZY: dict[str, Operation] = {
    "narrow rows": lambda t: t.narrow(0, 2, 3),
    "narrow columns": lambda t: t.narrow(1, 1, 4),
    "slice": lambda t: t[1:7:2, 3:],
    "ellipsis": lambda t: t[...],
    "index": lambda t: t[3],
    "chunk": lambda t: t.chunk(2, dim=0)[1],
    "split": lambda t: t.split([3, 5], dim=0)[1],
    "unbind": lambda t: t.unbind(1)[2],
    "transpose": lambda t: t.t(),
    "permute": lambda t: t.permute(1, 0),
    "view": lambda t: t.view(4, 12),
    "reshape": lambda t: t.reshape(-1),
    "flatten": lambda t: t.flatten(),
    "unsqueeze and squeeze": lambda t: t.unsqueeze(0).squeeze(0),
    "detach": lambda t: t.detach(),
    "contiguous": lambda t: t.contiguous(),
    "a chain": lambda t: t.view(2, 4, 6).transpose(0, 1)[1:].narrow(2, 0, 3),
}

COMPUTED: dict[str, Operation] = {
    "times two": lambda t: t * 2,
    "plus one (Gemma norms)": lambda t: 1 + t,
    "cast": lambda t: t.float(),
    "cat": lambda t: torch.cat([t, t]),
    "stack": lambda t: torch.stack([t.narrow(0, 0, 1), t.narrow(0, 1, 1)]),
    "index by tensor": lambda t: t[torch.tensor([5, 1])],
    "clone": lambda t: t.clone(),
    "transposed and made contiguous": lambda t: t.t().contiguous(),
    "bits": lambda t: t.view(torch.int16),
    "square (does not commute)": lambda t: t.square(),
    "repeat": lambda t: t.repeat(2, 1),
    "roll": lambda t: t.roll(1, 0),
    "matmul": lambda t: t @ t.t(),
}


@pytest.mark.parametrize("operation", LAZY.values(), ids=LAZY)
def test_views_stay_lazy_and_copy_the_sum(operation: Operation) -> None:
    """A view costs nothing, and its copy is the view of the sum, bit for bit."""
    lazy, eager = pair(8, 6)
    view, expected = operation(lazy), operation(eager)
    assert isinstance(view, FusedTensor)
    assert (view.shape, view.dtype) == (expected.shape, expected.dtype)
    out = torch.empty(expected.shape, dtype=torch.bfloat16)
    assert torch.equal(out.copy_(view), expected)
    assert not ledger(lazy).materialized
    assert ledger(lazy).elements == expected.numel()


@pytest.mark.parametrize("operation", COMPUTED.values(), ids=COMPUTED)
def test_anything_else_gets_the_computed_sum(operation: Operation) -> None:
    """An operation that may not commute is slower, never wrong, and counted."""
    lazy, eager = pair(8, 6)
    result = operation(lazy)
    assert not isinstance(result, FusedTensor)
    assert torch.equal(result, operation(eager))
    assert ledger(lazy).materialized


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_copy_rounds_once_to_the_parameters_dtype(dtype: torch.dtype) -> None:
    """A bf16 sum copied into another dtype is not rounded to bf16 on the way."""
    lazy, _ = pair(8, 6)
    v = lazy._fusion.terms[0][0].read(0, 48).view(8, 6)
    expected = reference(lazy._theta, v, dtype)
    assert torch.equal(torch.empty(8, 6, dtype=dtype).copy_(lazy), expected)


def test_a_copy_that_broadcasts_is_right() -> None:
    """One row copied into many."""
    lazy, eager = pair(1, 6)
    assert torch.equal(torch.empty(4, 6, dtype=torch.bfloat16).copy_(lazy), eager.expand(4, 6))


def test_a_part_of_a_parameter_is_written_alone() -> None:
    """As QKV packing does it: a slice of the parameter gets a slice of the sum."""
    lazy, eager = pair(8, 6)
    out = torch.zeros(20, 6, dtype=torch.bfloat16)
    out.narrow(0, 4, 8).copy_(lazy)
    assert torch.equal(out[4:12], eager)
    assert not out[:4].any()
    assert not out[12:].any()


def test_a_scalar_is_read_right() -> None:
    """`.item()` of a scale is the sum."""
    lazy, eager = pair()
    assert lazy.item() == eager.item()


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.mul_(2),
        lambda t: t.fill_(0),
        lambda t: t.copy_(torch.zeros(8, 6)),
        lambda t: torch._foreach_mul_([t], 2.0),
        lambda t: torch.add(t, 1, out=t),
    ],
    ids=["mul_", "fill_", "copy_", "foreach_mul_", "out"],
)
def test_writing_into_a_checkpoint_tensor_is_refused(write: Operation) -> None:
    """A write into a computed copy would be lost without a word."""
    lazy, _ = pair(8, 6)
    with pytest.raises(NotImplementedError, match="writes into a checkpoint's tensor"):
        write(lazy)


def test_zeroing_a_whole_tensor_is_no_write_that_could_be_lost() -> None:
    """GPT-OSS does it on ranks but the first, with a bias that must be added once."""
    lazy, _ = pair(8, 6)
    out = torch.ones(8, 6)
    out.copy_(lazy.zero_())
    assert torch.equal(out.view(torch.int32), torch.zeros(8, 6, dtype=torch.int32))


@pytest.mark.parametrize("shared", [lambda t: t[1:], lambda t: (t.narrow(0, 0, 2), t)[1]])
def test_zeroing_what_has_a_view_is_refused(shared: Operation) -> None:
    """The view would have to become zero too, or the whole in part."""
    lazy, _ = pair(8, 6)
    with pytest.raises(NotImplementedError, match=r"zero_\.default writes into"):
        shared(lazy).zero_()


def test_code_that_reaches_past_pytorch_fails_loudly() -> None:
    """There is no storage in which theta alone could be found."""
    lazy, _ = pair(8, 6)
    for reach in (
        lazy.numpy,
        lazy.data_ptr,
        lazy.tolist,
        lazy.share_memory_,
        lazy.__dlpack__,
    ):
        with pytest.raises(RuntimeError):
            reach()


def test_a_copy_into_meta_computes_nothing() -> None:
    """VLLM's reload first copies into meta parameters, to count."""
    lazy, _ = pair(8, 6)
    torch.empty(8, 6, dtype=torch.bfloat16, device="meta").copy_(lazy)
    assert ledger(lazy).copies == 0


def test_attributes_that_vllm_sets_stay_on_the_tensor() -> None:
    """The stacked-weights mapper marks tensors with a shard id."""
    lazy, _ = pair(8, 6)
    lazy.shard_id = "q"  # type: ignore[attr-defined]
    assert lazy.shard_id == "q"  # type: ignore[attr-defined]
    assert repr(lazy) == "FusedTensor((8, 6), torch.bfloat16, alphas=[0.3])"
