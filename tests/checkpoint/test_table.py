"""vllm_rvec.checkpoint.table: what a checkpoint holds, and what is refused."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from tests.support.privileges import without_privileges
from vllm_rvec.checkpoint.table import INDEX_NAME, read_config, read_table
from vllm_rvec.errors import CheckpointError, CheckpointNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable


def write_shard(path: Path, **tensors: torch.Tensor) -> None:
    save_file(tensors, path)


def test_tensors_of_all_shards_are_listed(tmp_path: Path) -> None:
    """Names, shapes and dtypes of every shard, without reading data."""
    write_shard(tmp_path / "a.safetensors", x=torch.zeros(2, 3))
    write_shard(tmp_path / "b.safetensors", y=torch.zeros(4, dtype=torch.bfloat16))
    table = read_table(tmp_path)
    assert {name: (info.shape, info.dtype) for name, info in table.items()} == {
        "x": ((2, 3), "F32"),
        "y": ((4,), "BF16"),
    }


def test_an_index_names_the_shards(tmp_path: Path) -> None:
    """Where there is an index, files that it does not name are left alone."""
    write_shard(tmp_path / "a.safetensors", x=torch.zeros(1))
    write_shard(tmp_path / "stray.safetensors", x=torch.zeros(9))
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    assert read_table(tmp_path)["x"].shape == (1,)


@pytest.mark.parametrize(
    "name",
    ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "", ".", "..", 7, None, [], "a/"],
)
def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path, name: object) -> None:
    """An index may name files of its own folder only."""
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(CheckpointError, match="points out of its folder"):
        read_table(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "nonsense"])
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    """Whatever the index holds, the error names it."""
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointError, match="is no safetensors index"):
        read_table(tmp_path)


def test_a_missing_folder_is_a_file_not_found_error(tmp_path: Path) -> None:
    """The error is also the builtin that a caller expects."""
    with pytest.raises(FileNotFoundError, match="does not exist") as caught:
        read_table(tmp_path / "nowhere")
    assert isinstance(caught.value, CheckpointNotFoundError)


def test_a_pickle_checkpoint_is_refused_unread(tmp_path: Path) -> None:
    """A folder with pickle files only is refused, and the message says why."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(CheckpointError, match="pickle files can run code"):
        read_table(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 2) + b"{}"[:1],
        struct.pack("<Q", 7) + b"not json",
        b"\x80\x04N.",
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    """Cut-off files, header bombs and other formats give an error that names the file."""
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read as safetensors"):
        read_table(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    """A file with a good header and too little data is refused by its header alone."""
    path = tmp_path / "model.safetensors"
    write_shard(path, x=torch.zeros(100))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut off"):
        read_table(tmp_path)


def test_one_name_in_two_shards_is_refused(tmp_path: Path) -> None:
    """Two tensors of one name: which one is meant can't be known."""
    write_shard(tmp_path / "a.safetensors", x=torch.zeros(1))
    write_shard(tmp_path / "b.safetensors", x=torch.zeros(1))
    with pytest.raises(CheckpointError, match="is in two files") as caught:
        read_table(tmp_path)
    assert caught.value.tensor_name == "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "no JSON object"), ("[]", "holds a list"), ("[" * 200_000, "RecursionError")],
)
def test_a_broken_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """config.json must hold an object."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_a_config_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    """An error of ours, with the system's reason."""
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="no regular file"):
        read_config(tmp_path)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [pipe, device, loop, Path.mkdir])
@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, "model.safetensors"])
def test_what_is_no_regular_file_is_refused_unopened(
    tmp_path: Path, make: Callable[[Path], None], name: str
) -> None:
    """A pipe would wait for ever, a device never end."""
    make(tmp_path / name)
    with pytest.raises(CheckpointError):
        read_config(tmp_path) if name == "config.json" else read_table(tmp_path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [pipe, device, loop, Path.mkdir])
def test_an_index_may_not_name_what_is_no_regular_file(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    """Whatever stands under the name that it gives."""
    make(tmp_path / "a.safetensors")
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        read_table(tmp_path)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300, "\u202e"])
def test_an_index_that_names_what_can_not_be_is_refused(tmp_path: Path, name: str) -> None:
    """No file has such a name: an error of ours."""
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(CheckpointError):
        read_table(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", b'{"a": 1, "a": 2}'),
        ("config.json", b'{"a": {"b": 1, "b": 1}}'),
        ("config.json", b'\xef\xbb\xbf{"a": 1}'),
        ("config.json", '{"a": 1}'.encode("utf-16")),
        ("config.json", b'{"a": "\xed\xa0\x80"}'),
        ("config.json", b'{"a": ' + b"1" * 5000 + b"}"),
        (INDEX_NAME, b'{"weight_map": {}, "weight_map": {"x": "a.safetensors"}}'),
        (INDEX_NAME, b'{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}'),
        (INDEX_NAME, b"[" * 200_000),
    ],
)
def test_json_that_readers_would_take_differently_is_refused(
    tmp_path: Path, name: str, text: bytes
) -> None:
    """Doubled names, other encodings, numbers and depths beyond measure."""
    (tmp_path / name).write_bytes(text)
    with pytest.raises(CheckpointError, match=name):
        read_config(tmp_path) if name == "config.json" else read_table(tmp_path)


def test_a_config_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    """64 MiB and a byte; sparse on disk."""
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(CheckpointError, match="larger than"):
        read_config(tmp_path)


def test_an_index_of_many_entries_is_read(tmp_path: Path) -> None:
    """200,000 names for one file: read once, in seconds."""
    write_shard(tmp_path / "a.safetensors", x=torch.zeros(1))
    names = {str(number): "a.safetensors" for number in range(200_000)}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": names}))
    assert set(read_table(tmp_path)) == {"x"}


@pytest.mark.parametrize("closed", ["config.json", INDEX_NAME, "a.safetensors", "."])
def test_what_may_not_be_read_is_refused(closed: str) -> None:
    """With the system's reason, and as an error of ours, whichever file it is."""
    with without_privileges() as folder:
        write_shard(folder / "a.safetensors", x=torch.zeros(1))
        (folder / "config.json").write_text("{}")
        if closed == INDEX_NAME:
            (folder / INDEX_NAME).write_text("{}")
        (folder / closed).chmod(0)
        with pytest.raises(CheckpointError, match="Permission denied"):
            read_config(folder) if closed == "config.json" else read_table(folder)
        (folder / closed).chmod(0o755)


@pytest.mark.parametrize(
    ("name", "what"), [("vector.json", "stored vector"), ("adapter_config.json", "LoRA adapter")]
)
def test_what_was_taken_for_a_checkpoint_is_named(name: str, what: str, tmp_path: Path) -> None:
    """Two flags' folders are easily swapped."""
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"no config.json\n.*{what}"):
        read_config(tmp_path)
