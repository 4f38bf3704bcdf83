"""benchmarks.gpu_fuse: it runs anywhere, and finds a result that is not the CPU's."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.gpu_fuse import make_file, measure, open_file
from vllm_rvec.loader import placement
from vllm_rvec.loader.placement import WAYS, Placement

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_rvec.loader.placement import Way

CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny tensors, in several steps each, and large enough to be measured."""
    monkeypatch.setattr(placement, "CHUNK_ELEMENTS", 1500)
    monkeypatch.setattr(placement, "MEASURED_ELEMENTS", 1)
    make_file(tmp_path / "w.safetensors", 1, is_tiny=True)
    return tmp_path / "w.safetensors"


def test_every_way_of_every_kind_has_its_rows(file: Path) -> None:
    """And so has the one that is chosen; without a GPU nothing is judged."""
    rows = list(measure(file, CPU, 1))
    assert len(rows) == 1 + 2 * 3 * (len(WAYS) + 1)
    assert {row.goal for row in rows} == {None}
    chosen = [row.note for row in rows if "chosen: share" in row.name]
    assert len(chosen) == 3
    assert all(any(note.endswith(str(way)) for way in WAYS) for note in chosen)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_result_one_bit_off_is_found(
    way: Way, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one weight, whatever way it went."""
    add = Placement._add

    def add_wrong(placement: Placement, taken: Way, *rest: torch.Tensor) -> None:
        add(placement, taken, *rest)  # type: ignore[arg-type]
        if taken == way:
            rest[-1].view(torch.int16)[-1, -1].bitwise_xor_(1)

    monkeypatch.setattr(Placement, "_add", add_wrong)
    with pytest.raises(AssertionError, match="1 results are not the CPU's"):
        list(measure(file, CPU, 1))


def test_the_sparse_vector_has_gaps_of_eight_bits(file: Path) -> None:
    """Its places stay within the tensor, and some values only bridge a gap."""
    for pair in open_file(file)["gaps"]:
        values, gaps = pair.parts
        assert gaps.dtype == torch.uint8
        assert int((gaps.long() + 1).sum()) <= pair.theta.numel()
        assert (values == 0).any()


def test_the_gpu_machine_needs_little() -> None:
    """It runs to its end with torch, safetensors, numpy and rich alone."""
    code = """
import runpy, sys
for name in ("vllm", "pydantic", "blake3", "psutil", "numba", "huggingface_hub", "filelock"):
    sys.modules[name] = None
sys.argv = ["gpu_fuse", "--device", "cpu", "--tiny", "--layers", "1", "--repeats", "1"]
runpy.run_module("benchmarks.gpu_fuse", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "int8" in done.stdout
