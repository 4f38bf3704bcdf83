"""Ways to a device: each gives the CPU's sum, bit for bit; tried on the CPU in place of a GPU."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks import placement
from benchmarks.gpu_fuse import make_file, measure, open_file
from benchmarks.placement import DenseParts, SparseParts, Staging, placements

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")
WAYS = placements(Staging(CPU))


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps for each tensor, also of the tiny ones."""
    monkeypatch.setattr(placement, "CHUNK_ELEMENTS", 1500)
    monkeypatch.setattr(placement, "BLOCK_VALUES", 64)


def test_every_way_is_exact_for_every_kind(tmp_path: Path) -> None:
    """`measure` compares each with a decoding of its own before it times it."""
    make_file(tmp_path / "w.safetensors", 1, is_tiny=True)
    rows = list(measure(tmp_path / "w.safetensors", CPU, 1))
    assert len(rows) == 1 + 2 * 3 * len(WAYS)
    assert {row.goal for row in rows} == {None}, "without a GPU nothing is judged"


@pytest.mark.parametrize("way", WAYS)
def test_a_result_one_bit_off_is_found(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rounding in place of two, as a contracting compiler does it, does not pass."""

    def contracted(theta: torch.Tensor, *rest: object) -> None:
        parts, slices, alpha, out = rest
        v = parts.decode(slices, theta.numel()) if slices else torch.zeros(theta.numel())  # type: ignore[attr-defined]
        out.copy_(theta.double() + float(alpha) * v.double())  # type: ignore[attr-defined, arg-type]

    make_file(tmp_path / "w.safetensors", 1, is_tiny=True)
    monkeypatch.setattr(placement, "_add", contracted)
    monkeypatch.setattr("benchmarks.gpu_fuse.placements", lambda _: {way: WAYS[way]})
    with pytest.raises(AssertionError, match="not the CPU's"):
        list(measure(tmp_path / "w.safetensors", CPU, 1))


@pytest.mark.parametrize("way", WAYS)
def test_weights_behind_the_last_value_are_placed_too(way: str) -> None:
    """A sparse vector says nothing of them; -0.0 + 0.0 is 0.0, as the formula has it."""
    theta = torch.full((4000,), 1.5).bfloat16()
    theta[-1] = -0.0
    parts = SparseParts(torch.tensor([2.0]).bfloat16(), torch.tensor([3], dtype=torch.uint8))
    out = torch.zeros_like(theta)
    WAYS[way](theta, parts, 0.5, out)
    expected = theta + 0.0
    expected[3] = 2.5
    assert torch.equal(out.view(torch.int16), expected.view(torch.int16))


def test_the_stored_tensors_stay_as_they_are() -> None:
    """Of float32 too, where widening copies nothing."""
    theta, v, out = torch.ones(10).bfloat16(), torch.ones(10), torch.ones(10)
    WAYS["added on the host, pageable"](theta, DenseParts(v), 0.5, out)
    assert torch.equal(v, torch.ones(10))


def test_the_sparse_vector_has_gaps_of_eight_bits(tmp_path: Path) -> None:
    """Its places stay within the tensor, and some values only bridge a gap."""
    make_file(tmp_path / "w.safetensors", 1, is_tiny=True)
    thetas, vectors = open_file(tmp_path / "w.safetensors")
    for theta, parts in zip(thetas, vectors["sparse"], strict=True):
        values, gaps = parts.tensors()
        assert gaps.dtype == torch.uint8
        assert int((gaps.long() + 1).sum()) <= theta.numel()
        assert (values == 0).any()


def test_the_gpu_machine_needs_neither_vllm_nor_this_package() -> None:
    """torch, safetensors, numpy and rich are enough."""
    code = "import sys, benchmarks.gpu_fuse; print([m for m in sys.modules if 'vllm' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
