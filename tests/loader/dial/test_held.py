"""How v is held: int8 rows beside what they were made of."""

from __future__ import annotations

import pytest
import torch

from vllm_rvec.loader.dial.held import FEW_ROWS, Int8Matrix, PlainMatrix


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_multiplies_as_its_decoded_rows_do(rows: int, dtype: torch.dtype) -> None:
    """Few rows take the bytes as they are, many decode them: the same product."""
    generator = torch.Generator().manual_seed(rows)
    matrix = torch.randn(48, 64, generator=generator)
    held = Int8Matrix(matrix.to(dtype))
    decoded = held.codes.float() * held.scales.unsqueeze(1)
    x = torch.randn(rows, 64, generator=generator).to(dtype)
    expected = x.float() @ decoded.T
    tolerance = 1e-4 if dtype == torch.float32 else 0.03 * float(expected.abs().max())
    torch.testing.assert_close(held.times(x).float(), expected, rtol=0, atol=tolerance)


def test_int8_says_what_it_lost() -> None:
    """The Frobenius norm of the difference, over that of v."""
    matrix = torch.randn(30, 40, generator=torch.Generator().manual_seed(3))
    held = Int8Matrix(matrix)
    decoded = held.codes.float() * held.scales.unsqueeze(1)
    lost = (decoded - matrix).norm() / matrix.norm()
    assert held.relative_error == pytest.approx(float(lost), rel=1e-5)
    assert 0 < held.relative_error < 0.01


def test_int8_rows_of_zeros_stay_zeros() -> None:
    """No division by a scale of 0."""
    matrix = torch.zeros(3, 8)
    matrix[1] = torch.linspace(-2, 2, 8)
    held = Int8Matrix(matrix)
    assert held.rows(torch.tensor([0, 2])).count_nonzero() == 0
    assert held.rows(torch.tensor([1]))[0, 0] == pytest.approx(-2)


def test_rows_are_looked_up() -> None:
    """As an embedding does."""
    matrix = torch.randn(5, 4)
    ids = torch.tensor([4, 0, 4])
    assert torch.equal(PlainMatrix(matrix).rows(ids), matrix[ids])
    torch.testing.assert_close(Int8Matrix(matrix).rows(ids), matrix[ids], rtol=0, atol=0.02)
