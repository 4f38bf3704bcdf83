"""vllm_rvec.checkpoint.reader: tensors by name, as views of mapped files."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from vllm_rvec.checkpoint.reader import CheckpointReader

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

THREADS = 8


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Have threads change places as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_threads")
def test_threads_may_open_a_file_at_once(tmp_path: Path) -> None:
    """Each gets its tensor, of one mapping: none sees a table of sizes that is half made."""
    stored = {f"t{i}": torch.tensor([float(i)]) for i in range(20_000)}
    save_file(stored, tmp_path / "model.safetensors")
    reader, start = CheckpointReader(tmp_path), Barrier(THREADS)

    def read(number: int) -> float:
        start.wait()
        return reader.tensor(f"t{number}").item()

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(read, range(THREADS))) == list(range(THREADS))
    pointers = [reader.tensor(f"t{i}").data_ptr() for i in range(2)]
    assert abs(pointers[1] - pointers[0]) < (tmp_path / "model.safetensors").stat().st_size
