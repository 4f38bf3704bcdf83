"""vllm_rvec.vector.reader: a vector is opened whole, or refused with what is wrong with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from tests.support.checkpoints import tensors
from tests.support.privileges import without_privileges
from tests.support.tiny_vectors import EXAMPLES, edit_manifest, example, redigest, write_vector
from vllm_rvec.errors import VectorCorruptError, VectorFormatError, VectorNotFoundError
from vllm_rvec.vector import VectorReader

if TYPE_CHECKING:
    from tests.support.checkpoints import Family


@pytest.fixture
def copy(vector: Path, tmp_path: Path) -> Path:
    """A dense vector of one's own to damage."""
    return shutil.copytree(vector, tmp_path / "copy")


@pytest.fixture
def every(tmp_path: Path) -> Path:
    """A vector with every encoding in two shards."""
    tensors = {name: example(name) for name in EXAMPLES}
    return write_vector(tmp_path / "every", tensors, shard_bytes=9000)


def test_every_tensor_comes_in_its_shape_and_dtype(every: Path) -> None:
    """Whatever it is stored as; a zero tensor is none."""
    vector = VectorReader(every)
    assert len(vector.shards) == 2
    for name, entry in vector.manifest.tensors.items():
        tensor = vector.tensor(name)
        if entry.encoding == "zero":
            assert tensor is None
        else:
            assert tensor is not None
            assert tuple(tensor.shape) == entry.shape
            dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
            assert tensor.dtype == dtypes[entry.dtype]


def test_a_dense_vector_is_plain_safetensors(copy: Path) -> None:
    """The library's own reader gives the same tensors under the same names."""
    vector = VectorReader(copy)
    plain = tensors(copy)
    assert plain.keys() == vector.manifest.tensors.keys()
    for name, expected in plain.items():
        found = vector.tensor(name)
        assert found is not None
        assert torch.equal(found, expected)


def test_a_released_tensor_is_read_again(copy: Path) -> None:
    """Releasing gives memory back, nothing else."""
    vector = VectorReader(copy)
    before = {name: vector.tensor(name) for name in vector.manifest.tensors}
    kept = {name: tensor.clone() for name, tensor in before.items() if tensor is not None}
    for name in vector.manifest.tensors:
        vector.release(name)
    for name, expected in kept.items():
        found = vector.tensor(name)
        assert found is not None
        assert torch.equal(found, expected)


def test_a_tensor_that_the_vector_has_not_is_a_key_error(copy: Path) -> None:
    """As with any mapping."""
    with pytest.raises(KeyError):
        VectorReader(copy).tensor("nothing")


def test_a_missing_vector_is_a_file_not_found_error(tmp_path: Path) -> None:
    """The message says what to give."""
    with pytest.raises(FileNotFoundError, match="the path does not exist") as caught:
        VectorReader(tmp_path / "nowhere")
    assert isinstance(caught.value, VectorNotFoundError)


@pytest.mark.parametrize("name", ["vector.pt", "vector.bin"])
def test_a_pickle_file_is_refused_unread(tmp_path: Path, name: str) -> None:
    """Given a pickle, alone or in a folder, nothing is unpickled."""
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(VectorFormatError, match="pickle"):
            VectorReader(path)


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b"])
def test_a_path_that_can_not_be_is_not_found(path: str) -> None:
    """Whatever was typed, the error is ours."""
    with pytest.raises(VectorNotFoundError):
        VectorReader(Path(path))


def test_a_truncated_shard_is_damaged(copy: Path) -> None:
    """Found by its size, before any engine."""
    shard = copy / "vector.safetensors"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(VectorCorruptError, match=f"{size - 100} bytes, not {size}"):
        VectorReader(copy)


def test_missing_shards_are_all_named(every: Path) -> None:
    """The manifest knows what should be there."""
    for shard in VectorReader(every).shards:
        shard.unlink()
    with pytest.raises(VectorCorruptError, match="missing") as caught:
        VectorReader(every)
    assert len(caught.value.problems) == 2


def test_shards_that_differ_from_the_manifest_are_named(copy: Path) -> None:
    """Missing, misshapen and of another dtype: all at once."""
    stored = tensors(copy)
    stored.pop("model.norm.weight")
    stored["model.embed_tokens.weight"] = torch.zeros(2, 2)
    stored["model.layers.0.mlp.up_proj.weight"] = stored["model.layers.0.mlp.up_proj.weight"].half()
    save_file(stored, copy / "vector.safetensors")
    redigest(copy)
    with pytest.raises(VectorCorruptError) as caught:
        VectorReader(copy)
    assert len(caught.value.problems) == 3
    assert caught.value.tensor_name == "model.embed_tokens.weight"


def test_a_shard_that_the_manifest_does_not_name_is_refused(copy: Path) -> None:
    """Shards of two vectors in one folder."""
    save_file({"stray": torch.zeros(1)}, copy / "stray.safetensors")
    with pytest.raises(VectorFormatError, match=r"stray\.safetensors"):
        VectorReader(copy)


def test_tensors_that_the_manifest_does_not_name_are_refused(copy: Path) -> None:
    """One that was put in a shard, and those of a manifest that names none."""
    save_file(tensors(copy) | {"stray": torch.zeros(1)}, copy / "vector.safetensors")
    redigest(copy)
    with pytest.raises(VectorFormatError, match="stray"):
        VectorReader(copy)
    edit_manifest(copy, tensors={})
    with pytest.raises(VectorFormatError, match="does not name"):
        VectorReader(copy)


def test_a_part_that_two_shards_hold_is_refused(every: Path) -> None:
    """Which one is meant can't be known."""
    vector = VectorReader(every)
    first, second = (shard.name for shard in vector.shards)
    (every / second).unlink()
    shutil.copy(every / first, every / second)
    redigest(every)
    with pytest.raises(VectorCorruptError, match="another shard holds too") as caught:
        VectorReader(every)
    assert "dense_f32" in caught.value.problems


def test_a_tensor_larger_than_the_machine_is_not_decoded(tmp_path: Path) -> None:
    """A small file may claim any shape; the error names the tensor, and nothing is allocated."""
    folder = write_vector(tmp_path / "v", {"t": example("sparse_gaps_u8")})
    fields = json.loads((folder / "vector.json").read_text())
    fields["tensors"]["t"]["shape"] = [1 << 40]
    edit_manifest(folder, tensors=fields["tensors"])
    with pytest.raises(VectorFormatError, match="this machine has") as caught:
        VectorReader(folder).tensor("t")
    assert caught.value.tensor_name == "t"


def test_a_shard_that_may_not_be_read_is_not_called_damaged(vector: Path) -> None:
    """Who is told that it is damaged would make it again; so for the manifest."""
    files = {file.name: file.read_bytes() for file in vector.iterdir()}
    for closed in ("vector.safetensors", "vector.json"):
        with without_privileges() as folder:
            for name, data in files.items():
                (folder / name).write_bytes(data)
            (folder / closed).chmod(0)
            with pytest.raises(VectorFormatError, match=f"{closed} can't be read\n.*ermission"):
                VectorReader(folder)


def test_a_checkpoint_taken_for_a_vector_is_named(family: Family) -> None:
    """Two flags' folders are easily swapped."""
    with pytest.raises(VectorFormatError, match=r"no vector\.json, it is a model's checkpoint"):
        VectorReader(family.target)
