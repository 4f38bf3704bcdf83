"""What tensors a safetensors checkpoint holds, from its headers alone.

Reads no tensor data and imports no torch, so that `serve` can check a target and a vector against
each other in milliseconds. safetensors itself validates each header (length, offsets, overlaps).
"""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from vllm_rvec.errors import CheckpointError, CheckpointNotFoundError

__all__ = [
    "FLOAT_DTYPES",
    "INDEX_NAME",
    "READABLE",
    "TensorInfo",
    "TensorTable",
    "is_folder",
    "is_there",
    "read_config",
    "read_header",
    "read_table",
    "what_it_is",
    "why_no_folder",
    "without_duplicates",
]

INDEX_NAME = "model.safetensors.index.json"
"""The file that maps tensor names to shards, in the Hub's convention."""

FLOAT_DTYPES = ("F32", "BF16", "F16")
"""The dtypes that a difference is stored in and can be added to, in safetensors' words."""

LENGTH_BYTES = 8
"""A safetensors file begins with its header's length, a little-endian integer."""

MAX_HEADER_BYTES = 32 << 20
"""A file with a larger header is refused unread: those of the largest models are a third of that.
Parsed, a header takes up to some twenty times its bytes."""
MAX_JSON_BYTES = 64 << 20
"""A larger config or index is refused unread."""

READABLE = "make it readable for the user that runs this"

NO_FILES = {"", ".", ".."}
"""Names that are no file's."""

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Files that only unpickling can read, and that can therefore run code."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor, as its shard's header describes it."""

    shard: Path
    """The safetensors file that holds it."""
    shape: tuple[int, ...]
    """Its shape, `[out, in]` for a linear weight."""
    dtype: str
    """Its dtype in safetensors' words: F32, BF16, F16, I8, F8_E4M3, ..."""
    offset_bytes: int
    """Where its data begins in the file."""
    size_bytes: int
    """How long its data is."""


TensorTable = dict[str, TensorInfo]
"""Tensors by the name that the checkpoint gives them."""


def read_table(folder: Path) -> TensorTable:
    """List the tensors of a checkpoint folder.

    Args:
        folder: Holds `*.safetensors`; where there is an index file, the shards that it names.

    Returns:
        Every tensor by name.

    Raises:
        CheckpointNotFoundError: There is no such folder.
        CheckpointError: No safetensors file in it, a shard that is missing or damaged, an index
            that points out of the folder, one name in two shards.
    """
    table: TensorTable = {}
    for shard in find_shards(folder):
        for name, info in read_header(shard).items():
            if name in table:
                raise CheckpointError(
                    f"tensor {name!r} is in two files of {folder}",
                    why=f"{table[name].shard.name} and {shard.name} both hold it",
                    fix="remove the file that does not belong to this checkpoint",
                    path=shard,
                    tensor_name=name,
                )
            table[name] = info
    return table


def find_shards(folder: Path) -> list[Path]:
    """List a checkpoint folder's safetensors files, in the order of their names.

    Raises:
        CheckpointNotFoundError: There is no such folder.
        CheckpointError: As for `read_table`.
    """
    if not is_folder(folder):
        raise CheckpointNotFoundError(
            f"there is no checkpoint folder {folder}",
            why=why_no_folder(folder),
            fix="give the folder that holds config.json and the safetensors files",
            path=folder,
        )
    index = folder / INDEX_NAME
    shards = _indexed_shards(index) if is_there(index) else sorted(folder.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(
            f"{folder} holds no safetensors file",
            why=_only_pickle(folder),
            fix="convert the checkpoint to safetensors first (transformers: save_pretrained)",
            path=folder,
        )
    return shards


def is_folder(path: Path) -> bool:
    """Tell whether there is a folder at a path, which may be anything that a user typed."""
    try:
        return path.is_dir()
    except (OSError, ValueError):  # too long a name, no permission, a NUL in it
        return False


def is_there(path: Path) -> bool:
    """Tell whether a folder holds something of that name; True where the system won't say.

    Reading it then gives the system's reason.
    """
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def why_no_folder(path: Path) -> str:
    """Say why there is no folder at a path."""
    try:
        return "it is a file" if path.exists() else "the path does not exist"
    except (OSError, ValueError) as exc:
        return str(exc)


KINDS = {
    "vector.json": "it is a stored vector",
    "adapter_config.json": "it is a LoRA adapter (see `vllm-rvec import-lora`)",
    "config.json": "it is a model's checkpoint",
}
"""What a folder is, by the file that it holds."""


def what_it_is(folder: Path) -> str:
    """Say what a folder is that was taken for something else; empty where that is not known."""
    return next((what for name, what in KINDS.items() if is_there(folder / name)), "")


def read_header(shard: Path) -> TensorTable:
    """List the tensors of one safetensors file.

    Raises:
        CheckpointError: It is missing, cut off, or no safetensors file, or its header is larger
            than 32 MiB.
    """
    try:
        _check_regular(shard)
        with shard.open("rb") as file:
            length = _header_length(file)
            # safetensors' own validation: lengths, offsets, overlaps, holes.
            with safe_open(shard, framework="np"):
                pass
            header = json.loads(file.read(length), object_pairs_hook=without_duplicates)
    except FileNotFoundError as exc:
        raise CheckpointError(
            f"{shard} is missing", fix="download the checkpoint again", path=shard
        ) from exc
    except PermissionError as exc:
        raise CheckpointError(
            f"{shard} can't be read", why="Permission denied", fix=READABLE, path=shard
        ) from exc
    except (SafetensorError, OSError, ValueError) as exc:
        raise CheckpointError(
            f"{shard} can't be read as safetensors",
            why=str(exc),
            fix="it is damaged or was cut off: download or write it again",
            path=shard,
        ) from exc
    header.pop("__metadata__", None)
    return {name: _info(shard, LENGTH_BYTES + length, entry) for name, entry in header.items()}


def _check_regular(path: Path) -> None:
    # Before it is opened: a pipe would have the reader wait for a writer.
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")


def _header_length(file: BinaryIO) -> int:
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header claims {length} bytes, at most {MAX_HEADER_BYTES} are read")
    return length


def read_config(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's config.json.

    Raises:
        CheckpointError: It is missing, or no JSON object.
    """
    path = folder / "config.json"
    if not is_there(path):
        raise CheckpointError(
            f"{folder} holds no config.json",
            why=what_it_is(folder),
            fix="give a Hugging Face checkpoint folder",
            path=path,
        )
    return _read_object(path, "no JSON object")


def _read_object(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON file that must hold an object."""
    try:
        found = json.loads(_read_text(path), object_pairs_hook=without_duplicates)
        why = "" if isinstance(found, dict) else f"it holds a {type(found).__name__}"
    except PermissionError as exc:
        raise CheckpointError(
            f"{path} can't be read", why="Permission denied", fix=READABLE, path=path
        ) from exc
    # A file of brackets alone runs the parser out of stack.
    except (OSError, ValueError, RecursionError) as exc:
        why = f"{type(exc).__name__}: {exc}"
    if why:
        raise CheckpointError(
            f"{path} is {what}", why=why, fix="download the checkpoint again", path=path
        )
    return dict(found)


def _read_text(path: Path) -> str:
    _check_regular(path)
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"it is larger than {MAX_JSON_BYTES} bytes")
    # Not bytes to json.loads: that takes UTF-16 and halves of surrogate pairs too.
    return data.decode()


def _info(shard: Path, data_bytes: int, entry: dict[str, Any]) -> TensorInfo:
    start, end = entry["data_offsets"]
    return TensorInfo(shard, tuple(entry["shape"]), entry["dtype"], data_bytes + start, end - start)


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object's dictionary; a hook for `json.loads` that refuses doubled names."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one JSON object")
    return found


def _indexed_shards(index: Path) -> list[Path]:
    weight_map = _read_object(index, "no safetensors index").get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{index} is no safetensors index",
            why="it has no weight_map",
            fix="download the checkpoint again",
            path=index,
        )
    names = weight_map.values()
    for name in names:
        if not isinstance(name, str) or name in NO_FILES or PurePosixPath(name).name != name:
            raise CheckpointError(
                f"{index} points out of its folder", why=f"it names the file {name!r}", path=index
            )
    return [index.parent / name for name in sorted(set(names))]


def _only_pickle(folder: Path) -> str:
    try:
        files = sorted(folder.iterdir())
    except OSError as exc:
        return str(exc)
    pickles = [path.name for path in files if path.suffix in PICKLE_SUFFIXES]
    if ggufs := [path.name for path in files if path.suffix == ".gguf"]:
        return f"it holds {ggufs[0]}: llama.cpp's format, mostly quantized, is not read"
    if not pickles:
        return "there are none, and nothing else to load"
    return f"it holds {pickles[0]}: pickle files can run code and are never read"
