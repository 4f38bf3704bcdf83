"""Vectors and targets that differ in one thing from those that belong together."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from tests.support.checkpoints import tensors
from vllm_rvec.vector import Manifest, VectorReader
from vllm_rvec.vector.names import is_vocabulary
from vllm_rvec.vector.writer import write_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["edited_vector", "made_dense", "resized", "with_tensors", "write_tokenizer"]


def edited_vector(vector: Path, folder: Path, **fields: object) -> Path:
    """Copy a vector, with other values in its manifest."""
    shutil.copytree(vector, folder, ignore=shutil.ignore_patterns("vector.json"))
    write_manifest(folder, Manifest.read(vector).model_copy(update=fields))
    return folder


def made_dense(vector: Path, folder: Path) -> Path:
    """Write what a vector decodes to as one plain safetensors file; zero tensors too."""
    reader = VectorReader(vector)
    decoded = {
        name: torch.zeros(entry.shape) if (v := reader.tensor(name)) is None else v.clone()
        for name, entry in reader.manifest.tensors.items()
    }
    folder.mkdir()
    save_file(decoded, folder / "decoded.safetensors")
    return folder


def with_tensors(checkpoint: Path, folder: Path, stored: Mapping[str, torch.Tensor]) -> Path:
    """Copy a checkpoint, with other tensors."""
    shutil.copytree(checkpoint, folder)
    save_file(dict(stored), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def resized(checkpoint: Path, folder: Path, rows: int) -> Path:
    """Copy a checkpoint with another number of embedding rows; new ones hold -0.0 and small ones.

    -0.0 is the number that a sum with zero changes.
    """
    stored = tensors(checkpoint)
    for name in filter(is_vocabulary, list(stored)):
        old = stored[name]
        new = torch.linspace(-1e-3, 1e-3, rows * old.shape[1]).view(rows, -1).to(old.dtype)
        new[:, ::2] = -0.0
        new[: len(old)] = old[:rows]
        stored[name] = new
    with_tensors(checkpoint, folder, stored)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": rows}))
    return folder


def write_tokenizer(folder: Path, tokens: Sequence[str], added: Mapping[int, str] = {}) -> Path:
    """Write a tokenizer.json with a token for each id, and added tokens."""
    content = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": text} for i, text in added.items()],
        "model": {"type": "BPE", "vocab": {text: i for i, text in enumerate(tokens)}},
    }
    folder.mkdir(exist_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path
