"""vllm_rvec.checkpoint.writer and reader: files that safetensors itself reads."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vllm_rvec.checkpoint.reader import CheckpointReader
from vllm_rvec.checkpoint.writer import ShardWriter
from vllm_rvec.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

TENSORS = {
    "model.ä.weight": torch.randn(3, 5),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "transposed": torch.randn(4, 6).t(),
}


def write(path: Path, names: list[str], dtype: torch.dtype) -> None:
    shapes = [(name, tuple(tensor.shape)) for name, tensor in TENSORS.items()]
    with ShardWriter(path, shapes, {"format": "pt"}) as writer:
        for name in names:
            writer.write(name, TENSORS[name].to(dtype))
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
    with ShardWriter(path, [("a", (2,))], {}) as writer:
        writer.write("a", torch.ones(2))
    with pytest.raises(SafetensorError):
        load_file(path)


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    """The writer creates; it does not replace."""
    path = tmp_path / "x.safetensors"
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        ShardWriter(path, [], {})
    assert path.read_text() == "precious"


def test_a_tensor_outlives_its_reader(tmp_path: Path) -> None:
    """Tensors are views of the mapped file, which stays mapped while they are used."""
    write(tmp_path / "x.safetensors", list(TENSORS), torch.float32)
    tensor = CheckpointReader(tmp_path).tensor("model.ä.weight")
    gc.collect()
    assert torch.equal(tensor, TENSORS["model.ä.weight"])


def raw_file(path: Path, header: str, data: bytes) -> None:
    """Write a safetensors file byte by byte, as other writers might."""
    encoded = header.encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def test_data_that_is_not_aligned_is_read_right(tmp_path: Path) -> None:
    """Headers of any length are legal; torch wants its elements at even places."""
    values = torch.tensor([1.5, -2.0, 3.25])
    header = '{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    for padding in range(8):
        raw_file(tmp_path / "x.safetensors", header + " " * padding, values.numpy().tobytes())
        assert torch.equal(CheckpointReader(tmp_path).tensor("x"), values)


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """Readers that take the first and readers that take the last would differ."""
    entry = '"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    raw_file(tmp_path / "x.safetensors", f"{{{entry},{entry}}}", b"\0" * 4)
    with pytest.raises(CheckpointError, match="can't be read as safetensors"):
        CheckpointReader(tmp_path)


def test_a_file_that_shrank_meanwhile_is_an_error(tmp_path: Path) -> None:
    """Replaced between the look at its header and the first read: named, not read beyond."""
    path = tmp_path / "x.safetensors"
    write(path, list(TENSORS), torch.float32)
    reader = CheckpointReader(tmp_path)
    path.write_bytes(path.read_bytes()[:-150])
    with pytest.raises(CheckpointError, match="can't be read from"):
        reader.tensor("transposed")


def test_a_file_of_another_size_is_an_error_for_every_tensor(tmp_path: Path) -> None:
    """Also for those whose bytes are still there: they may be another's by now."""
    path = tmp_path / "x.safetensors"
    write(path, list(TENSORS), torch.float32)
    reader = CheckpointReader(tmp_path)
    with path.open("ab") as file:
        file.write(b"1")
    for name in TENSORS:
        with pytest.raises(CheckpointError, match="it had"):
            reader.tensor(name)


def test_writing_into_a_tensor_never_reaches_the_file(tmp_path: Path) -> None:
    """The mapping is private."""
    path = tmp_path / "x.safetensors"
    write(path, ["scalar"], torch.float32)
    before = path.read_bytes()
    CheckpointReader(tmp_path).tensor("scalar").fill_(7)
    assert path.read_bytes() == before
