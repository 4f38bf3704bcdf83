"""At least 10,000 mutated vectors: no crash, and no wrong success.

A wrong success is a vector that opens and verifies, and has other names, shapes, dtypes, encodings
or scalings than the original, or decodes to other bits. Two kinds of mutation:

- damage: something changed in the files, as by a disk or a transfer. Every change of a shard, and
  every change of what the manifest says, must be found.
- forgery: the digests were made to fit the change. Digests can't tell, so it may succeed; then
  every tensor must decode to finite numbers in the shape that the manifest says. Anything else is
  refused by an error of ours.
"""

from __future__ import annotations

import json
import random
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.support.tiny_vectors import EXAMPLES, example, redigest, reseal, write_vector
from vllm_rvec.errors import VectorCorruptError, VectorFormatError
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.verification import verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

OURS = (VectorFormatError, VectorCorruptError)

SEEDS = range(8)
MUTATIONS_EACH = 420
"""Of each seed and each of the three kinds: 10,080 in all."""

DECODED_ELEMENTS = 1 << 16
"""A forged shape may be larger than a test should decode."""

Facts = dict[str, tuple[object, ...]]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vector with every encoding, in three shards."""
    folder = tmp_path_factory.mktemp("mutations") / "original"
    return write_vector(folder, {name: example(name) for name in EXAMPLES}, shard_bytes=1500)


@pytest.fixture
def mutant(original: Path, tmp_path: Path) -> Path:
    """A copy to mutate; its files are written anew for each mutation."""
    return shutil.copytree(original, tmp_path / "mutant")


def facts_of(vector: VectorReader) -> Facts:
    """Return all that a vector adds to a model."""
    facts: Facts = {}
    for name, entry in vector.manifest.tensors.items():
        bits = None
        if entry.elements <= DECODED_ELEMENTS and (tensor := vector.tensor(name)) is not None:
            assert tuple(tensor.shape) == entry.shape
            assert torch.isfinite(tensor).all(), name
            bits = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        facts[name] = (entry.shape, entry.dtype, entry.encoding, entry.scaling, bits)
    return facts


def outcome(folder: Path) -> Facts | None:
    """Open, verify, decode: what the vector adds, or None where one of them refused."""
    try:
        vector = VectorReader(folder)
        verify(vector, remembered=False)
        return facts_of(vector)
    except OURS:
        return None


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, insert, repeat, swap or overwrite bytes."""
    at, other = sorted(rng.randrange(len(data)) for _ in range(2))
    length = rng.randint(1, 16)
    before, piece, rest = data[:at], data[at : at + length], data[at + length :]
    swapped = data[other : other + length] + data[at + length : other] + piece
    return rng.choice(
        (
            before + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
            before,
            before + rng.randbytes(length) + data[at:],
            before + rest,
            before + data[other : other + length] + rest,
            before + bytes([rng.choice(b'0123456789"{}[],:.-ex\\ \xff\0')]) + data[at + 1 :],
            before + swapped + data[other + length :],
        )
    )


ODD_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7,
        8,
        63,
        64,
        65,
        255,
        256,
        2**31,
        2**32,
        2**48,
        2**63,
        10**30,
    ),
    *(0.0, -0.0, 0.5, 1.0, -1.5, 1e-320, 1e30, 1e300, 1.7976931348623157e308),
    *("", "F32", "BF16", "F16", "I8", "U8", "U16", "I64", "F64", "BOOL", "..", "a/b", "\ud800"),
    *("zero", "dense", "sparse", "int8", "lowrank", "strict", "common", "0" * 64),
    *([], [0], [1], [2, 3], [3, 2], [6], [2, 3, 1], [0, 24], [10], [310], [2000], [2**40], {}),
)


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Give the path of every value in a JSON document."""
    yield path
    if isinstance(value, dict | list):
        for key in _keys(value):
            yield from nodes(value[key], (*path, key))


def mutated_json(document: Any, rng: random.Random) -> Any:
    """Replace, drop, rename, nudge, copy or swap values of a JSON document."""
    document = json.loads(json.dumps(document))
    paths = [path for path in nodes(document) if path]
    (*path, key), (*other_path, other_key) = rng.choice(paths), rng.choice(paths)
    parent, other = _at(document, path), _at(document, other_path)
    match rng.randrange(6):
        case 0:
            parent[key] = rng.choice(ODD_VALUES)
        case 1:
            parent[key] = _nudged(parent[key], rng)
        case 2:
            del parent[key]
        case 3 if isinstance(parent, dict):
            parent[rng.choice(("renamed", f"{key}:values", f"{key}x", "u"))] = parent.pop(key)
        case 4:
            parent[key] = json.loads(json.dumps(other[other_key]))
        case _:
            parent[key], other[other_key] = (
                json.loads(json.dumps(value)) for value in (other[other_key], parent[key])
            )
    return document


def _nudged(value: Any, rng: random.Random) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return rng.choice((value + 1, value - 1, -value, value * 2, value / 2))
    return rng.choice(ODD_VALUES)


def _keys(parent: Any) -> Any:
    return parent if isinstance(parent, dict) else range(len(parent))


def _at(document: Any, path: list[Any]) -> Any:
    for key in path:
        document = document[key]
    return document


def split_shard(data: bytes) -> tuple[Any, bytes]:
    """Cut a safetensors file into its header and its data."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined_shard(header: Any, data: bytes, rng: random.Random) -> bytes:
    encoded = json.dumps(header).encode() + b" " * rng.randrange(9)
    return len(encoded).to_bytes(8, "little") + encoded + data


def damage_shard(original: Path, mutant: Path, rng: random.Random) -> Callable[[], bool]:
    """Mutate a shard's bytes or its header; say whether anything is different."""
    name = rng.choice(sorted(path.name for path in original.glob("*.safetensors")))
    before = (original / name).read_bytes()
    if rng.random() < 0.5:
        header, data = split_shard(before)
        after = joined_shard(mutated_json(header, rng), data, rng)
    else:
        after = mutated_bytes(before, rng)
    (mutant / name).write_bytes(after)
    return lambda: after != before


def damage_manifest(original: Path, mutant: Path, rng: random.Random) -> Callable[[], bool]:
    """Mutate the manifest's text or what it says; say whether it says anything else."""
    before = (original / "vector.json").read_bytes()
    if rng.random() < 0.5:
        after = json.dumps(mutated_json(json.loads(before), rng)).encode()
    else:
        after = mutated_bytes(before, rng)
    (mutant / "vector.json").write_bytes(after)
    # Compared as text: 1 and 1.0 and true are equal in Python.
    return lambda: _meaning(after) != _meaning(before)


def _meaning(text: bytes) -> str | None:
    try:
        return json.dumps(json.loads(text.decode()), sort_keys=True)
    except (ValueError, RecursionError):
        return None


def restore(original: Path, mutant: Path) -> None:
    for path in original.iterdir():
        if (data := path.read_bytes()) != (mutant / path.name).read_bytes():
            (mutant / path.name).write_bytes(data)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", [damage_shard, damage_manifest])
def test_damage_is_always_found(
    kind: Callable[[Path, Path, random.Random], Callable[[], bool]],
    seed: int,
    original: Path,
    mutant: Path,
) -> None:
    """Whatever changed in a shard, or in what the manifest says, is refused by an error of ours."""
    rng = random.Random(f"{kind.__name__} {seed}")  # noqa: S311 - deterministic
    expected = facts_of(VectorReader(original))
    found = 0
    for number in range(MUTATIONS_EACH):
        restore(original, mutant)
        is_changed = kind(original, mutant, rng)
        result = outcome(mutant)
        if is_changed():
            assert result is None, f"mutation {number} was not found"
            found += 1
        else:
            assert result in (None, expected)  # refused for a name that stands twice now, say
    assert found > MUTATIONS_EACH * 0.9


@pytest.mark.parametrize("seed", SEEDS)
def test_a_forgery_is_refused_or_harmless(seed: int, original: Path, mutant: Path) -> None:
    """With digests that fit: no crash, and what verifies decodes to finite numbers of its shape."""
    rng = random.Random(f"forgery {seed}")  # noqa: S311 - deterministic
    accepted = 0
    for _ in range(MUTATIONS_EACH):
        restore(original, mutant)
        if rng.random() < 0.5:
            damage_shard(original, mutant, rng)
            redigest(mutant)
        else:
            path = mutant / "vector.json"
            path.write_text(json.dumps(mutated_json(json.loads(path.read_bytes()), rng)))
            if isinstance(json.loads(path.read_text()), dict):
                reseal(mutant)
        accepted += outcome(mutant) is not None
    assert accepted > 0  # or the forgeries are too coarse to test anything
