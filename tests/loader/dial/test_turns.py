"""Which rows of a batch have an alpha, and what is added to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vllm_rvec.loader.dial.turns import Turns

CPU = torch.device("cpu")

some_alphas = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 9), st.integers(1, 3)),
    elements=st.sampled_from([0.0, 0.0, 0.5, 1.0, -1.0, 0.3]),
)


def reference(out: torch.Tensor, part: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    """The formula of `arithmetic`: all in float32, rounded once; rows at 0 as they were."""
    total = (out.float() + alphas.unsqueeze(1) * part.float()).to(out.dtype)
    return torch.where((alphas == 0).unsqueeze(1), out, total)


@settings(max_examples=80)
@given(some_alphas, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 9))
def test_every_row_gets_its_own_alpha_and_the_others_keep_their_bits(
    alphas: np.ndarray, dtype: torch.dtype, seed: int
) -> None:
    """For each vector; float32 within a fused multiply-add, bfloat16 within its last bit."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(len(alphas), 5, generator=generator).to(dtype)
    part = torch.randn(len(alphas), 5, generator=generator).to(dtype)
    turns = Turns(alphas, CPU)
    for k, turn in enumerate(turns.of_vector):
        mine, column = out.clone(), torch.from_numpy(alphas[:, k].copy())
        if turn is not None:
            turn.add(mine, turn.pick(part))
        torch.testing.assert_close(mine, reference(out, part, column), rtol=1.6e-2, atol=1e-6)
        untouched = column == 0
        assert torch.equal(mine[untouched], out[untouched])


def test_a_batch_at_alpha_zero_has_no_turn() -> None:
    """Nothing of v is computed for it."""
    turns = Turns(np.zeros((4, 2), np.float32), CPU)
    assert turns.any is None
    assert turns.of_vector == (None, None)


def test_rows_at_zero_are_not_given_to_the_vector() -> None:
    """Half of the rows: half of the work."""
    (turn,) = Turns(np.asarray([[0], [1], [0], [0.5]], np.float32), CPU).of_vector
    assert turn is not None
    assert turn.pick(torch.arange(4)).tolist() == [1, 3]


def test_all_rows_at_one_alpha_need_no_picking() -> None:
    """The common case of an engine that is asked for one variant."""
    (turn,) = Turns(np.full((3, 1), 0.3, np.float32), CPU).of_vector
    assert turn is not None
    assert turn.rows is None
    assert turn.uniform == pytest.approx((0.3,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_graph_replays_is_the_same_sum(dtype: torch.dtype) -> None:
    """CUDA graphs read alphas when they run, and multiply also by 0."""
    alphas = torch.tensor([[0.0], [0.5], [-1.0]])
    out, part = torch.randn(3, 4).to(dtype), torch.randn(3, 4).to(dtype)
    fixed = Turns.fixed(alphas)
    (turn,) = fixed.of_vector
    mine = out.clone()
    assert turn is not None
    turn.add(mine, part)
    torch.testing.assert_close(mine, reference(out, part, alphas[:, 0]))
    alphas.zero_()
    again = out.clone()
    turn.add(again, part)
    assert torch.equal(again, out)
