"""vllm_rvec.checkpoint.writer and reader: files that safetensors itself reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vllm_rvec.checkpoint.reader import CheckpointReader
from vllm_rvec.checkpoint.writer import ShardWriter

if TYPE_CHECKING:
    from pathlib import Path

TENSORS = {
    "model.ä.weight": torch.randn(3, 5),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "transposed": torch.randn(4, 6).t(),
}


def write(path: Path, names: list[str], dtype: torch.dtype) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    with ShardWriter(path, shapes, dtype, {"format": "pt"}) as writer:
        for name in names:
            writer.write(name, TENSORS[name])
        writer.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("names", [list(TENSORS), ["scalar"], []])
def test_safetensors_reads_what_was_written(
    tmp_path: Path, dtype: torch.dtype, names: list[str]
) -> None:
    """Any part of the announced tensors, in any dtype, comes back by safetensors' own reader."""
    path = tmp_path / "x.safetensors"
    write(path, names, dtype)
    loaded = load_file(path)
    assert set(loaded) == set(names)
    for name in names:
        assert torch.equal(loaded[name], TENSORS[name].to(dtype))


def test_an_unfinished_file_is_no_safetensors_file(tmp_path: Path) -> None:
    """A writer that did not finish leaves nothing that reads as tensors."""
    path = tmp_path / "x.safetensors"
    with ShardWriter(path, {"a": (2,)}, torch.float32, {}) as writer:
        writer.write("a", torch.ones(2))
    with pytest.raises(SafetensorError):
        load_file(path)


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    """The writer creates; it does not replace."""
    path = tmp_path / "x.safetensors"
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        ShardWriter(path, {}, torch.float32, {})
    assert path.read_text() == "precious"


def test_a_tensor_outlives_its_reader(tmp_path: Path) -> None:
    """Tensors are views of the mapped file, which stays mapped while they are used."""
    write(tmp_path / "x.safetensors", list(TENSORS), torch.float32)
    with CheckpointReader(tmp_path) as reader:
        tensor = reader.tensor("model.ä.weight")
    assert torch.equal(tensor, TENSORS["model.ä.weight"])
