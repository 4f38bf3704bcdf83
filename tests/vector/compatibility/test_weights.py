"""vllm_rvec.vector.compatibility.weights: single weights, without torch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vllm_rvec.checkpoint.table import read_table
from vllm_rvec.errors import CheckpointError
from vllm_rvec.vector.compatibility.weights import read_weights

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float16}
POSITIONS = np.array([0, 59, 7, 7])


def stored(folder: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {n: torch.randn(12, 5, generator=generator).to(dtype) for n, dtype in DTYPES.items()}
    # A single byte in front: nothing after it is aligned.
    save_file({"0": torch.zeros(1, dtype=torch.uint8)} | made, folder / "model.safetensors")
    return made


def test_weights_are_those_of_the_file(tmp_path: Path) -> None:
    """float32, bfloat16 and float16, at any position, twice too; others are left out."""
    made = stored(tmp_path)
    wanted = {**dict.fromkeys(made, POSITIONS), "0": np.array([0])}
    found = read_weights(read_table(tmp_path), wanted)
    assert found.keys() == made.keys()
    for name, values in found.items():
        assert values.dtype == np.float32
        assert values.tolist() == made[name].flatten()[POSITIONS].float().tolist()


def test_a_file_that_got_shorter_is_named(tmp_path: Path) -> None:
    """Between its header and its data something cut it off."""
    stored(tmp_path)
    table, path = read_table(tmp_path), tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is shorter"):
        read_weights(table, dict.fromkeys(DTYPES, POSITIONS))
    path.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        read_weights(table, dict.fromkeys(DTYPES, POSITIONS))


def test_no_torch_is_needed(tmp_path: Path) -> None:
    """`serve` reads weights before any engine starts."""
    import subprocess

    code = "import sys, vllm_rvec.vector.compatibility.weights; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
