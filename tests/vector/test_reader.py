"""vllm_rvec.vector.reader, manifest and verification: what is refused, and how it is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.checkpoints import tensors
from vllm_rvec.errors import VectorCorruptError, VectorFormatError, VectorNotFoundError
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.verification import cache_folder, verify_finite


@pytest.fixture
def copy(vector: Path, tmp_path: Path) -> Path:
    """A vector of one's own to damage."""
    return shutil.copytree(vector, tmp_path / "copy")


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "vector.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "other"},
        {"format_version": 99},
        {"format_version": True},
        {"tie_word_embeddings": "yes"},
        {"surprise": 1},
        {"tensors": {"x": {"shape": ["1"], "dtype": "F32", "encoding": "dense"}}},
        {"tensors": {"x": {"shape": [1], "dtype": "I64", "encoding": "dense"}}},
        {"tensors": {"x": {"shape": [1], "dtype": "F8_E4M3", "encoding": "dense"}}},
        {"tensors": {"x": {"shape": [1], "dtype": "F32", "encoding": "magic"}}},
        {"tensors": {"x": {"shape": [-1], "dtype": "F32", "encoding": "dense"}}},
    ],
)
def test_what_the_reader_does_not_know_is_refused(copy: Path, changes: dict[str, Any]) -> None:
    """A version, field, encoding or shape from elsewhere: not guessed at."""
    edit_manifest(copy, **changes)
    with pytest.raises(VectorFormatError, match="no manifest that this version reads"):
        VectorReader(copy)


def test_a_manifest_that_is_no_json_is_refused(copy: Path) -> None:
    """Cut off in the middle, say."""
    (copy / "vector.json").write_text('{"format": "rvec"')
    with pytest.raises(VectorFormatError, match="no manifest that this version reads"):
        VectorReader(copy)


@pytest.mark.parametrize("field", ["format", "format_version", "formula", "donors", "tensors"])
def test_a_manifest_without_one_of_its_fields_is_refused(copy: Path, field: str) -> None:
    """Nothing is assumed of a file that does not say what it is."""
    path = copy / "vector.json"
    fields = json.loads(path.read_text())
    del fields[field]
    path.write_text(json.dumps(fields))
    with pytest.raises(VectorFormatError, match=field):
        VectorReader(copy)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"format": "rvec", "format": "rvec"}', "\xff", "3"]
)
def test_hostile_json_is_refused(copy: Path, text: str) -> None:
    """Deep nesting, doubled names, no object: an error of ours, never a crash."""
    (copy / "vector.json").write_text(text, encoding="latin-1")
    with pytest.raises(VectorFormatError, match="no manifest that this version reads"):
        VectorReader(copy)


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b"])
def test_a_path_that_can_not_be_is_not_found(path: str) -> None:
    """Whatever was typed, the error is ours."""
    with pytest.raises(VectorNotFoundError):
        VectorReader(Path(path))


def test_a_user_without_a_home_can_load(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's random user: the verdict is not remembered, nothing else."""
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder() is None
    assert verify_finite(VectorReader(copy))


def test_a_truncated_shard_is_corrupt(copy: Path) -> None:
    """Found by its header, before any engine."""
    shard = copy / "vector.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(VectorCorruptError, match=r"vector\.safetensors can't be read"):
        VectorReader(copy)


def test_a_missing_shard_is_corrupt(copy: Path) -> None:
    """The manifest knows what should be there."""
    (copy / "vector.safetensors").unlink()
    with pytest.raises(VectorCorruptError, match="holds no safetensors file"):
        VectorReader(copy)


def test_shards_that_differ_from_the_manifest_are_named(copy: Path) -> None:
    """Missing, misshapen and of another dtype: all at once."""
    stored = tensors(copy)
    stored.pop("model.norm.weight")
    stored["model.embed_tokens.weight"] = torch.zeros(2, 2)
    stored["model.layers.0.mlp.up_proj.weight"] = stored["model.layers.0.mlp.up_proj.weight"].half()
    save_file(stored, copy / "vector.safetensors")
    with pytest.raises(VectorCorruptError) as caught:
        VectorReader(copy)
    assert len(caught.value.problems) == 3


def test_a_tensor_that_the_manifest_does_not_name_is_refused(copy: Path) -> None:
    """Shards of two vectors in one folder."""
    save_file({"stray": torch.zeros(1)}, copy / "stray.safetensors")
    with pytest.raises(VectorFormatError, match="stray"):
        VectorReader(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_corrupt(copy: Path, value: float) -> None:
    """Every tensor concerned is named."""
    stored = tensors(copy)
    stored["model.norm.weight"][5] = value
    stored["model.embed_tokens.weight"][1, 2] = value
    save_file(stored, copy / "vector.safetensors")
    with pytest.raises(VectorCorruptError, match="NaN or infinity in 2 tensors") as caught:
        verify_finite(VectorReader(copy))
    assert set(caught.value.problems) == {"model.norm.weight", "model.embed_tokens.weight"}


def test_the_verdict_is_remembered_until_a_file_changes(copy: Path) -> None:
    """The second look reads no data; a file that was written since is read again."""
    assert verify_finite(VectorReader(copy))
    assert not verify_finite(VectorReader(copy))
    stored = tensors(copy)
    stored["model.norm.weight"][0] = float("nan")
    save_file(stored, copy / "vector.safetensors")
    with pytest.raises(VectorCorruptError):
        verify_finite(VectorReader(copy))


def test_a_cache_that_cannot_be_written_costs_only_the_look(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container without a writable home serves all the same."""
    blocker = tmp_path / "blocker"
    blocker.write_text("a file, not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocker))
    assert cache_folder() == blocker / "vllm_rvec"
    assert verify_finite(VectorReader(copy))
    assert verify_finite(VectorReader(copy))
