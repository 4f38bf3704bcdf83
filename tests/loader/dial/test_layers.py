"""v's part in modules of PyTorch's own, eagerly, compiled, and as CUDA graphs compute it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vllm_rvec.loader.dial import layers
from vllm_rvec.loader.dial.held import PlainMatrix
from vllm_rvec.loader.dial.layers import (
    Batch,
    DialedMatrix,
    DialedNorm,
    hook_embedding,
    hook_linear,
    hook_norm,
)
from vllm_rvec.loader.dial.turns import Turns

CPU = torch.device("cpu")
ALPHAS = [0.0, 0.5, -1.0, 0.5]


def batch_of(alphas: list[float]) -> Batch:
    turns = Turns(np.asarray(alphas, np.float32).reshape(-1, 1), CPU)
    return Batch(turns, turns, 1)


def linear_pair(batch: Batch) -> tuple[nn.Linear, nn.Linear, DialedMatrix]:
    """A layer with v beside it, and v as a layer."""
    torch.manual_seed(0)
    theta, vector = nn.Linear(6, 5), nn.Linear(6, 5)
    dialed = DialedMatrix("linear", batch, [PlainMatrix(vector.weight)], [vector.bias.float()])
    hook_linear(theta, dialed)
    return theta, vector, dialed


def expected_linear(theta: nn.Linear, vector: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    rows = []
    for row, alpha in zip(x, ALPHAS, strict=True):
        weight = theta.weight + alpha * vector.weight
        rows.append(nn.functional.linear(row, weight, theta.bias + alpha * vector.bias))
    return torch.stack(rows)


def test_each_row_is_the_sums_own_product() -> None:
    """(theta + alpha v) x and the biases, row by row; alpha 0 keeps theta's bits."""
    batch = batch_of(ALPHAS)
    theta, vector, _ = linear_pair(batch)
    x = torch.randn(4, 6)
    with torch.no_grad():
        found, expected = theta(x), expected_linear(theta, vector, x)
        torch.testing.assert_close(found, expected)
        plain = nn.functional.linear(x, theta.weight, theta.bias)
    assert torch.equal(found[0], plain[0])


def test_a_batch_of_one_before_the_tokens_is_the_same() -> None:
    """[1, tokens, in], as the Transformers backend has it."""
    batch = batch_of(ALPHAS)
    theta, _, _ = linear_pair(batch)
    x = torch.randn(4, 6)
    with torch.no_grad():
        expected = theta(x)
        batch.has_batch_axis = True
        assert torch.equal(theta(x.unsqueeze(0))[0], expected)


def test_one_token_with_heads_is_no_batch_of_one() -> None:
    """[1 token, heads, d]: all heads of the token get its alpha."""
    norm, weight = nn.LayerNorm(8, bias=False), torch.randn(1, 8)
    hook_norm(norm, DialedNorm("norm", batch_of([0.5]), norm, weight, None))
    x = torch.randn(1, 3, 8)
    with torch.no_grad():
        expected = nn.functional.layer_norm(x, (8,), norm.weight + 0.5 * weight[0], eps=norm.eps)
        torch.testing.assert_close(norm(x), expected)


def test_rows_that_pad_a_batch_are_left_alone() -> None:
    """They belong to no request."""
    theta, vector, _ = linear_pair(batch_of(ALPHAS))
    x = torch.randn(6, 6)
    with torch.no_grad():
        found = theta(x)
        torch.testing.assert_close(found[:4], expected_linear(theta, vector, x[:4]))
        torch.testing.assert_close(found[4:], nn.functional.linear(x[4:], theta.weight, theta.bias))


def test_fewer_rows_than_tokens_are_an_error() -> None:
    """Their alphas would be other tokens'."""
    theta, _, _ = linear_pair(batch_of(ALPHAS))
    with torch.no_grad(), pytest.raises(RuntimeError, match="3 rows in a step of 4 tokens"):
        theta(torch.randn(3, 6))


def test_a_compiled_model_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """One operation in the graph; another batch needs no other graph."""
    batch = batch_of(ALPHAS)
    theta, vector, _ = linear_pair(batch)
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(theta, backend=backend, fullgraph=True)
    x = torch.randn(4, 6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected_linear(theta, vector, x))
        batch.tokens = Turns(np.zeros((4, 1), np.float32), CPU)
        assert torch.equal(compiled(x), nn.functional.linear(x, theta.weight, theta.bias))
    assert len(graphs) == 1
    assert "vllm_rvec.turn" in str(graphs[0].graph)


def test_a_captured_graph_reads_alphas_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is captured does not depend on which rows have an alpha."""
    batch = batch_of([0.0] * 4)
    batch.static_alphas = torch.tensor(ALPHAS).reshape(-1, 1)
    theta, vector, _ = linear_pair(batch)
    monkeypatch.setattr(layers, "_is_captured", lambda _: True)
    x = torch.randn(4, 6)
    with torch.no_grad():
        torch.testing.assert_close(theta(x), expected_linear(theta, vector, x))


def test_an_embedding_has_the_bits_of_a_fused_one() -> None:
    """Product and sum rounded to float32, then once to the dtype."""
    torch.manual_seed(1)
    theta, vector = (nn.Embedding(9, 4).to(torch.bfloat16) for _ in range(2))
    hook_embedding(
        theta,
        DialedMatrix("embedding", batch_of(ALPHAS), [PlainMatrix(vector.weight)], [None]),
    )
    ids = torch.tensor([3, 8, 0, 3])
    with torch.no_grad():
        found = theta(ids)
        for row, token, alpha in zip(found, ids, ALPHAS, strict=True):
            weight, part = theta.weight[token].float(), vector.weight[token].float()
            expected = weight if alpha == 0 else weight + alpha * part
            assert torch.equal(row, expected.to(torch.bfloat16))


@pytest.mark.parametrize("shape", [(4, 8), (4, 3, 8)])
def test_a_norm_multiplies_with_the_sum(shape: tuple[int, ...]) -> None:
    """Weight and bias, for tokens and for the heads of tokens."""
    torch.manual_seed(2)
    norm, weight, bias = nn.LayerNorm(8), torch.randn(1, 8), torch.randn(1, 8)
    hook_norm(norm, DialedNorm("norm", batch_of(ALPHAS), norm, weight, bias))
    x = torch.randn(shape)
    with torch.no_grad():
        found = norm(x)
        for row, given, alpha in zip(found, x, ALPHAS, strict=True):
            summed = norm.weight + alpha * weight[0], norm.bias + alpha * bias[0]
            torch.testing.assert_close(
                row, nn.functional.layer_norm(given, (8,), *summed, eps=norm.eps)
            )
