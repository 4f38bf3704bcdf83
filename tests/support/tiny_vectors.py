"""Tiny vectors with every encoding, and ways to damage or forge them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from unittest import mock

import blake3
import torch

from vllm_rvec.vector import writer
from vllm_rvec.vector.encodings import Choice, Encoded, Source, encode
from vllm_rvec.vector.encodings.parts import in_memory
from vllm_rvec.vector.layout import LORA_A, LORA_B
from vllm_rvec.vector.manifest import Donor, Donors, Manifest, Vocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["EXAMPLES", "edit_manifest", "example", "redigest", "reseal", "write_vector"]

EXAMPLES = (
    "dense_f32",
    "dense_bf16",
    "dense_f16",
    "zero",
    "sparse_bitmap",
    "sparse_gaps_u8",
    "sparse_gaps_u16",
    "int8",
    "lowrank",
)
"""A tensor for every way to store one."""


def example(name: str) -> tuple[tuple[int, ...], Encoded]:
    """Return one of `EXAMPLES`: its shape, and what is stored of it."""
    if name == "lowrank":
        # Not by a decomposition, whose last bits are the linear algebra library's.
        lora_a = torch.tensor([[1.0, -2.0, 0.5], [0.25, 0.0, 4.0]])
        lora_b = torch.tensor([[3.0, 1.0], [-1.0, 0.5]])
        parts = in_memory(LORA_A, lora_a), in_memory(LORA_B, lora_b)
        return (2, 3), Encoded("lowrank", "F32", parts, scaling=0.5, squared_norm=20.95703125)
    encoding, _, kind = name.partition("_")
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}.get(kind, torch.float32)
    tensor = _tensor(name)
    choice = Choice("auto" if name == "zero" else encoding, dtype)
    return tuple(tensor.shape), encode(Source.of(tensor), choice)


def _tensor(name: str) -> torch.Tensor:
    if name.startswith("sparse_gaps"):
        # Bytes bridge one wide gap with a zero; many are cheaper with two bytes each.
        size, places = (310, (0, 1, 2, 3, 4, 300)) if name.endswith("u8") else (2000, (7, 1500))
        out = torch.zeros(size)
        out[list(places)] = torch.arange(1, len(places) + 1) * 0.1
        return out
    if name == "sparse_bitmap":
        return torch.tensor([[0.0, 0.1, 0.0, -0.2, 0.0], [0.3, 0.0, 0.0, 0.0, 1e-42]])
    if name == "zero":
        return torch.zeros(4, 2)
    if name == "int8":
        return torch.tensor([[127.0, -1.0, 0.4], [0.0, 0.0, 0.0], [0.5, 0.25, -0.5]])
    return torch.tensor([[1.5, -2.0, 0.1], [-0.0, 1e-3, 3.0]])


def write_vector(
    folder: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], Encoded]],
    *,
    shard_bytes: int = 5 << 30,
    squared_norms: Mapping[str, float] | None = None,
    base_norm: float | None = None,
    **fields: Any,
) -> Path:
    """Write a vector with everything fixed that is not its tensors, or given.

    Args:
        folder: Where to; must not exist.
        tensors: Shape and what is stored, by name.
        shard_bytes: How many a shard may hold, counted in float32.
        squared_norms: Of the exact tensors, by name, for those whose error is looked at.
        base_norm: Of every tensor.
        fields: Others of the manifest than the fixed ones.
    """
    folder.mkdir(parents=True)
    shapes = {name: shape for name, (shape, _) in tensors.items()}
    with mock.patch.object(writer, "MAX_SHARD_BYTES", shard_bytes):
        vector = writer.VectorWriter(folder, shapes)
    with vector:
        for name, (shape, encoded) in tensors.items():
            squared_norm = (squared_norms or {}).get(name, encoded.squared_norm)
            vector.add(name, shape, encoded, squared_norm=squared_norm, base_norm=base_norm)
        files = vector.finish()
    donor = Donor(id="owner/model", revision="0" * 40, license="mit", files={"x": "0" * 64})
    fixed: dict[str, Any] = {
        "formula": "tuned - base",
        "complete": False,
        "donors": Donors(tuned=donor, base=donor),
        "architecture": "Qwen2ForCausalLM",
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "vocabulary": Vocabulary(),
        "roundtrip": None,
        "tokenizer": None,
        "sketch": None,
        "lineage": (),
        "created": "2026-01-01T00:00:00+00:00",
        "tool": "vllm_rvec golden",
    }
    manifest = Manifest(tensors=vector.entries, files=files, **(fixed | fields))
    writer.write_manifest(folder, manifest)
    return folder


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Change fields as a forger would: the digest is made to fit."""
    path = folder / "vector.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    reseal(folder)


def redigest(folder: Path) -> None:
    """Make the manifest fit the shards as they are."""
    manifest = json.loads((folder / "vector.json").read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        digest = blake3.blake3(data).hexdigest()
        manifest["files"][name] = {"size_bytes": len(data), "blake3": digest}
    edit_manifest(folder, files=manifest["files"])


def reseal(folder: Path) -> None:
    """Make a manifest's digest fit: FORMAT.md's rule, written out here once more."""
    path = folder / "vector.json"
    manifest = json.loads(path.read_text())
    manifest.pop("digest", None)
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["digest"] = blake3.blake3(canonical.encode()).hexdigest()
    path.write_text(json.dumps(manifest))
