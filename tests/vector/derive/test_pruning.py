"""vllm_rvec.vector.derive.pruning: the largest stay, or some are dropped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.vectors import random_tensor
from vllm_rvec.vector.derive import pruning
from vllm_rvec.vector.derive.pruning import drop_randomly, keep_largest
from vllm_rvec.vector.derive.randomness import raw_numbers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def reference(v: torch.Tensor, count: int) -> torch.Tensor:
    """Sort by magnitude, then position."""
    flat = v.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), i))[:count]
    kept = torch.zeros(v.numel(), dtype=v.dtype)
    kept[order] = v.flatten()[order]
    return kept.view(v.shape)


@settings(max_examples=100)
@given(
    values=st.lists(
        st.floats(width=16, allow_nan=False, allow_infinity=False)
        | st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0]),
        max_size=40,
    ),
    count=st.integers(0, 41),
    dtype=st.sampled_from(DTYPES),
)
def test_the_largest_stay_and_ties_go_to_the_lowest_position(
    values: list[float], count: int, dtype: torch.dtype
) -> None:
    """As a sort by magnitude and position has it, for any numbers."""
    v = torch.tensor(values, dtype=dtype)
    assert torch.equal(keep_largest(v, count), reference(v, count))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [2, 64, 1 << 17])
def test_exactly_so_many_stay_whatever_the_blocks(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ties are counted over blocks; bf16 has many of them."""
    monkeypatch.setattr(pruning, "BLOCK_ELEMENTS", block)
    v = random_tensor(31, 33, dtype=dtype)
    v[::2] = v[1]
    for count in (1, 10, 500, 1022, 1023):
        kept = keep_largest(v, count)
        assert int(kept.count_nonzero()) == count
        assert torch.equal(kept, reference(v, count))


def test_the_input_stays_as_it_is() -> None:
    """It is a view of a mapped file."""
    v = random_tensor(8, 8)
    before = v.clone()
    keep_largest(v, 3)
    drop_randomly(v, 0.5, raw_numbers(0, "w", "dare"))
    assert torch.equal(v, before)


def test_tensors_of_any_rank_are_taken() -> None:
    """Scalars, empty ones, and views that are not contiguous."""
    assert keep_largest(torch.tensor(3.0), 1).item() == 3
    assert keep_largest(torch.empty(0, 4), 0).shape == (0, 4)
    assert drop_randomly(torch.empty(0, 4), 0.5, raw_numbers(0, "w", "dare")).shape == (0, 4)
    v = random_tensor(6, 4).T
    assert torch.equal(keep_largest(v, 5), reference(v.contiguous(), 5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_dropped_is_multiplied(dtype: torch.dtype) -> None:
    """By 1 / (1 - p), one rounding in float32; about p of all are dropped."""
    v = random_tensor(300, 300, dtype=dtype)
    v[v == 0] = 1.0
    out = drop_randomly(v, 0.3, raw_numbers(7, "w", "dare"))
    is_kept = out != 0
    assert torch.equal(out[is_kept], (v.float() * (1 / 0.7))[is_kept])
    dropped = 1 - is_kept.double().mean().item()
    assert abs(dropped - 0.3) < 4 * (0.3 * 0.7 / v.numel()) ** 0.5
    assert out.dtype == torch.float32


def test_what_is_dropped_is_a_matter_of_position_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of values, shapes or blocks."""
    dropped = []
    for v, block in (
        (torch.ones(999), 1 << 17),
        (torch.full((37, 27), -2.0).bfloat16(), 16),
    ):
        monkeypatch.setattr(pruning, "BLOCK_ELEMENTS", block)
        dropped.append(drop_randomly(v, 0.5, raw_numbers(1, "w", "dare")).flatten() == 0)
    assert torch.equal(*dropped)


def test_draws_are_those_of_every_machine() -> None:
    """The first eight of a stream, written down: integers of Philox, the same everywhere."""
    out = drop_randomly(torch.ones(16), 0.5, raw_numbers(1, "model.norm.weight", "dare"))
    assert (out == 0).int().tolist() == DROPPED
    assert pruning._draws(raw_numbers(1, "w", "dare"), 3).tolist() == FIRST_DRAWS


DROPPED = [1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 0, 1]
FIRST_DRAWS = [390912616, 1442217144, 3379649952]


def test_probability_zero_drops_nothing_and_one_in_a_billion_is_left() -> None:
    """Both ends of the range."""
    v = random_tensor(100, 100)
    assert torch.equal(drop_randomly(v, 0.0, raw_numbers(0, "w", "dare")), v)
    rare = drop_randomly(v, 1 - 1e-12, raw_numbers(0, "w", "dare"))
    assert int(rare.count_nonzero()) == 0


def test_seeds_names_and_purposes_have_streams_of_their_own() -> None:
    """None is another's."""
    keys = [(0, "w", "dare"), (1, "w", "dare"), (0, "v", "dare"), (0, "w", "gaussian")]
    streams = [tuple(np.asarray(raw_numbers(*key).random_raw(4)).tolist()) for key in keys]
    assert len(set(streams)) == len(keys)
    assert tuple(np.asarray(raw_numbers(*keys[0]).random_raw(4)).tolist()) == streams[0]
