"""vllm_rvec.arithmetic: the formula, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_rvec.arithmetic import (
    BLOCK_ELEMENTS,
    FLOAT_DTYPES,
    difference,
    fuse,
    fuse_all,
    is_finite,
)

ALPHAS = (1.0, -1.0, 0.5, 0.3, -0.7, 1.5, 1e-3, 3.14159)
COUNT = 1 << 16


def reference(
    theta: torch.Tensor, v: torch.Tensor, alpha: float, dtype: torch.dtype
) -> torch.Tensor:
    """The formula as the module's docstring writes it."""
    return (theta.float() + torch.tensor(alpha, dtype=torch.float32) * v.float()).to(dtype)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equality of bits; any NaN equals any other (their payload is not defined)."""
    size = {2: torch.int16, 4: torch.int32}[left.element_size()]
    equal = left.view(size) == right.view(size)
    return bool((equal | (left.isnan() & right.isnan())).all())


def random_bits(dtype: torch.dtype, seed: int, count: int = COUNT) -> torch.Tensor:
    """Every kind of number: normal, subnormal, zero of both signs, infinite, NaN."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.float32:
        bits = torch.randint(-(2**31), 2**31, (count,), generator=generator)
        return bits.to(torch.int32).view(dtype)
    bits = torch.randint(-(2**15), 2**15, (count,), generator=generator)
    return bits.to(torch.int16).view(dtype)


def small_step(dtype: torch.dtype, count: int = COUNT) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and a vector of the sizes that occur."""
    generator = torch.Generator().manual_seed(7)
    theta = torch.randn(count, generator=generator) * 0.05
    return theta.to(dtype), (torch.randn(count, generator=generator) * 1e-3).to(dtype)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_one_dtype_equals_the_reference_for_all_bit_patterns(
    dtype: torch.dtype, alpha: float
) -> None:
    """The one-kernel path is the reference, for any bits and any alpha."""
    for theta, v in (
        (random_bits(dtype, 1), random_bits(dtype, 2)),
        small_step(dtype),
    ):
        out = fuse(theta, v, alpha, out=torch.empty_like(theta))
        assert same_bits(out, reference(theta, v, alpha, dtype))


@pytest.mark.parametrize(
    "dtypes", [d for d in itertools.product(FLOAT_DTYPES, repeat=3) if len(set(d)) > 1]
)
def test_mixed_dtypes_round_once_to_the_result(dtypes: tuple[torch.dtype, ...]) -> None:
    """Any mixture of dtypes goes through float32 and is rounded once."""
    theta, v = random_bits(dtypes[0], 3), random_bits(dtypes[1], 4)
    for alpha in (1.0, 0.3):
        out = fuse(theta, v, alpha, out=torch.empty(COUNT, dtype=dtypes[2]))
        assert same_bits(out, reference(theta, v, alpha, dtypes[2]))


@pytest.mark.parametrize("vector_dtype", FLOAT_DTYPES)
def test_views_of_any_stride_and_more_than_one_block(vector_dtype: torch.dtype) -> None:
    """Slices along either dimension, transposed, larger than a block: the same bits."""
    rows = 3 * BLOCK_ELEMENTS // 512 + 5
    theta = torch.randn(rows, 600).bfloat16()
    v = (torch.randn(rows, 600) * 0.01).to(vector_dtype)
    for view in (lambda t: t[:, 17:529], lambda t: t[5:], lambda t: t.t(), lambda t: t[3, 5]):
        out = fuse(view(theta), view(v), 0.3, out=torch.empty_like(view(theta)))
        assert same_bits(out, reference(view(theta), view(v), 0.3, torch.bfloat16))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_alpha_zero_returns_the_target_bit_for_bit(dtype: torch.dtype) -> None:
    """At alpha 0 even an infinite vector and a negative zero in the target change nothing."""
    theta = random_bits(dtype, 5)
    theta[:2] = torch.tensor([-0.0, 0.0])
    v = torch.full_like(theta, float("inf"))
    for alpha in (0.0, -0.0):
        out = fuse(theta, v, alpha, out=torch.empty_like(theta))
        assert torch.equal(
            out.view(torch.uint8),
            torch.where(theta.isnan(), out, theta).view(torch.uint8),
        )


Terms = list[tuple[torch.Tensor, float]]


def summed(theta: torch.Tensor, terms: Terms, dtype: torch.dtype) -> torch.Tensor:
    """The formula for several vectors as the module's docstring writes it."""
    total = theta.float()
    for v, alpha in terms:
        if alpha != 0:
            total = total + torch.tensor(alpha, dtype=torch.float32) * v.float()
    return total.to(dtype)


@pytest.mark.parametrize("dtypes", list(itertools.product(FLOAT_DTYPES, repeat=3)))
def test_several_vectors_are_added_in_order_and_rounded_once(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
) -> None:
    """Any bits in any mixture of dtypes; a term with alpha 0 is as if it were not there."""
    theta, v, w = (random_bits(dtype, seed) for seed, dtype in enumerate(dtypes))
    infinite = torch.full((COUNT,), float("inf"))
    for terms in (
        [(v, 0.3), (w, -0.7)],
        [(v, 1.0), (w, 1.0), (v, 0.3)],
        [(v, 0.3), (infinite, 0.0), (w, 1.5)],
    ):
        out = fuse_all(theta, terms, out=torch.empty_like(theta))
        assert same_bits(out, summed(theta, terms, theta.dtype))


def test_order_and_the_single_rounding_matter() -> None:
    """Another order, or a rounding between the terms, gives other bits: both are pinned."""
    theta, v = small_step(torch.bfloat16)
    theta, v = theta.float(), v.float()
    w = torch.randn(COUNT, generator=torch.Generator().manual_seed(9)) * 1e-3
    forth = fuse_all(theta, [(v, 0.3), (w, 0.7)], out=torch.empty_like(theta))
    back = fuse_all(theta, [(w, 0.7), (v, 0.3)], out=torch.empty_like(theta))
    assert not same_bits(forth, back)
    narrow = theta.bfloat16()
    once = fuse_all(narrow, [(v, 0.3), (w, 0.7)], out=torch.empty_like(narrow))
    half = fuse(narrow, v, 0.3, out=torch.empty_like(narrow))
    assert not same_bits(once, fuse(half, w, 0.7, out=torch.empty_like(narrow)))


def test_a_sum_of_views_of_any_stride_and_more_than_one_block() -> None:
    """Slices, transposed, scalars, empty tensors, larger than a block: the same bits."""
    rows = 3 * BLOCK_ELEMENTS // 512 + 5
    theta, v, w = (torch.randn(rows, 600).to(d) for d in (torch.bfloat16, *[torch.float32] * 2))
    for view in (
        lambda t: t[:, 17:529],
        lambda t: t.t(),
        lambda t: t[3, 5],
        lambda t: t[:0],
    ):
        terms = [(view(v), 0.3), (view(w), 0.7)]
        out = fuse_all(view(theta), terms, out=torch.empty_like(view(theta)))
        assert same_bits(out, summed(view(theta), terms, torch.bfloat16))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_one_term_is_fuse_and_no_term_is_theta(dtype: torch.dtype) -> None:
    """Bit for bit, negative zeros included; so is a sum whose alphas are all 0."""
    theta, v = small_step(dtype)
    theta[:2] = torch.tensor([-0.0, 0.0])
    infinite = torch.full_like(theta, float("inf"))
    fused = fuse(theta, v, 0.3, out=torch.empty_like(theta))
    for terms, expected in (
        ([(v, 0.3)], fused),
        ([(infinite, 0.0), (v, 0.3), (infinite, -0.0)], fused),
        ([], theta),
        ([(infinite, 0.0), (infinite, -0.0)], theta),
    ):
        out = fuse_all(theta, terms, out=torch.empty_like(theta))
        assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))


def test_torch_add_is_not_the_reference() -> None:
    """The trap that the fuse avoids: torch.add rounds alpha to bfloat16 first."""
    theta, v = small_step(torch.bfloat16)
    v = v * 30
    assert not same_bits(torch.add(theta, v, alpha=0.3), reference(theta, v, 0.3, torch.bfloat16))


def test_difference_and_sum_give_the_tuned_donor_back() -> None:
    """float32 v of two bf16 donors: base + 1 * v == tuned for weights of the sizes that occur."""
    base, step = small_step(torch.bfloat16)
    tuned = (base.float() + step.float()).bfloat16()
    v = difference(tuned, base)
    assert v.dtype == torch.float32
    assert same_bits(fuse(base, v, 1.0, out=torch.empty_like(base)), tuned)


@given(st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), max_size=40))
def test_is_finite_agrees_with_looking_at_each(values: list[float]) -> None:
    """The fast answer is the exact one, also where a sum of finite terms overflows."""
    tensor = torch.tensor(values, dtype=torch.float32)
    for dtype in FLOAT_DTYPES:
        cast = tensor.to(dtype)
        assert is_finite(cast) == bool(torch.isfinite(cast).all())
