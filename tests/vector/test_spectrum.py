"""vllm_rvec.vector.spectrum: the largest singular values of a vector's matrices."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from tests.support.checkpoints import tensors
from vllm_rvec.errors import VectorCorruptError
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.extract import extract
from vllm_rvec.vector.spectrum import spectra, spectrum_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family


def test_singular_values_are_those_of_the_stored_matrices(vector: Path) -> None:
    """Of every matrix, none of a row; progress ends at the last weight."""
    stored, seen = tensors(vector), []
    found = spectra(VectorReader(vector), lambda done, total: seen.append((done, total)))
    assert set(found) == {name for name, tensor in stored.items() if tensor.dim() == 2}
    for name, spectrum in found.items():
        expected = torch.linalg.svdvals(stored[name].double()).square()
        assert spectrum.squares == pytest.approx(expected[:64].tolist(), rel=1e-3, abs=1e-9)
        assert spectrum.total == pytest.approx(float(expected.sum()), rel=1e-5)
    assert seen[-1][0] == seen[-1][1]


def test_factors_give_the_values_of_their_product(family: Family, tmp_path: Path) -> None:
    """A lowrank tensor is never multiplied out, and has no more values than its rank."""
    extract(family.tuned, family.base, tmp_path / "v", encoding="lowrank", rank=4)
    reader = VectorReader(tmp_path / "v")
    for name, spectrum in spectra(reader).items():
        tensor = reader.tensor(name)
        assert tensor is not None
        expected = torch.linalg.svdvals(tensor.double()).square()
        assert spectrum.squares[:4] == pytest.approx(expected[:4].tolist(), rel=1e-4)
        assert spectrum.total == pytest.approx(float(expected.sum()), rel=1e-4)


@pytest.mark.parametrize("scale", [1e-38, 1e37])
def test_numbers_at_the_ends_of_float32_have_a_spectrum(scale: float) -> None:
    """Their squares have none in float32."""
    spectrum = spectrum_of(torch.tensor([[3.0, 0.0], [0.0, 4.0]]) * scale)
    shares = [square / spectrum.total for square in spectrum.squares]
    assert shares == pytest.approx([16 / 25, 9 / 25], rel=1e-4)


def test_a_stack_is_the_sum_of_its_matrices() -> None:
    """Experts that share one tensor count as matrices of their own."""
    first, second = torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([2.0, 2.0]))
    spectrum = spectrum_of(torch.stack([first, torch.zeros(2, 2), second]))
    assert spectrum.squares == pytest.approx((13.0, 5.0))
    assert spectrum.total == pytest.approx(18.0)


def test_the_randomized_method_finds_a_low_rank_in_a_large_matrix() -> None:
    """Beyond the size up to which the exact method is taken."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(600, 5, generator=generator) for _ in range(2))
    spectrum = spectrum_of((left @ right.T).bfloat16())
    assert sum(spectrum.squares[:5]) / spectrum.total > 0.9999


def test_nan_is_said_by_tensor(vector: Path, tmp_path: Path) -> None:
    """A damaged weight is no crash in the middle of a decomposition."""
    reader = VectorReader(vector)
    name = "model.layers.1.mlp.up_proj.weight"
    info = reader.table[name]
    damaged = tmp_path / "v"
    damaged.mkdir()
    data = bytearray(info.shard.read_bytes())
    data[info.offset_bytes : info.offset_bytes + 4] = b"\x00\x00\xc0\x7f"
    (damaged / info.shard.name).write_bytes(data)
    (damaged / "vector.json").write_text(
        json.dumps(json.loads((vector / "vector.json").read_text()))
    )
    with pytest.raises(VectorCorruptError, match="has no singular values") as caught:
        spectra(VectorReader(damaged))
    assert caught.value.tensor_name == name
