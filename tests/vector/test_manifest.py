"""vllm_rvec.vector.manifest: what a manifest must say, and its digest."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from tests.support.tiny_vectors import EXAMPLES, edit_manifest, example, reseal, write_vector
from vllm_rvec.errors import VectorCorruptError, VectorFormatError
from vllm_rvec.vector.manifest import Manifest, TensorEntry
from vllm_rvec.vector.writer import write_manifest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A vector with every encoding."""
    return write_vector(tmp_path / "v", {name: example(name) for name in EXAMPLES})


def fields_of(folder: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / "vector.json").read_text())
    return fields


def test_what_is_written_is_what_is_read(folder: Path) -> None:
    """Every field comes back; writing it again gives the same bytes."""
    manifest = Manifest.read(folder)
    again = folder / "again"
    again.mkdir()
    write_manifest(again, manifest)
    assert (again / "vector.json").read_bytes() == (folder / "vector.json").read_bytes()
    assert Manifest.read(again) == manifest


def test_the_digest_is_that_of_the_canonical_json(folder: Path) -> None:
    """By FORMAT.md's rule, computed here by other code."""
    before = fields_of(folder)["digest"]
    reseal(folder)
    assert fields_of(folder)["digest"] == before
    assert Manifest.read(folder).digest == before


@pytest.mark.parametrize(
    "changes",
    [
        {"created": "2026-01-02T00:00:00+00:00"},
        {"complete": True},
        {"digest": "0" * 64},
        {"digest": ""},
        {"tool": "vllm_rvec golden "},
    ],
)
def test_an_edited_manifest_is_damaged(folder: Path, changes: dict[str, Any]) -> None:
    """Even where what it says now is possible."""
    path = folder / "vector.json"
    path.write_text(json.dumps(fields_of(folder) | changes))
    with pytest.raises(VectorCorruptError, match="edited or damaged") as caught:
        Manifest.read(folder)
    assert caught.value.path == path


def test_a_scaling_that_was_edited_is_seen(folder: Path) -> None:
    """It changes v, and no file's digest covers it but the manifest's own."""
    fields = fields_of(folder)
    fields["tensors"]["lowrank"]["scaling"] = 0.25
    (folder / "vector.json").write_text(json.dumps(fields))
    with pytest.raises(VectorCorruptError, match="edited or damaged"):
        Manifest.read(folder)


def test_layout_and_order_are_not_part_of_the_digest(folder: Path) -> None:
    """A tool may print the same JSON in another way."""
    fields = dict(reversed(fields_of(folder).items()))
    (folder / "vector.json").write_text(json.dumps(fields, indent=7))
    assert Manifest.read(folder).tensors


def test_a_copy_with_changes_is_sealed_anew(folder: Path) -> None:
    """Commands that change a vector take its manifest over, and need not know of the digest."""
    changed = Manifest.read(folder).model_copy(update={"tool": "another"})
    (folder / "vector.json").unlink()
    write_manifest(folder, changed)
    assert Manifest.read(folder).tool == "another"


def test_what_no_reader_would_take_is_not_written(folder: Path) -> None:
    """model_copy checks nothing; writing does, before there is a file."""
    broken = Manifest.read(folder).model_copy(update={"format_version": 99})
    (folder / "vector.json").unlink()
    with pytest.raises(ValidationError):
        write_manifest(folder, broken)
    assert not (folder / "vector.json").exists()


def entry(**changes: Any) -> dict[str, Any]:
    fields = {
        "shape": [2, 3],
        "dtype": "F32",
        "encoding": "dense",
        "scaling": None,
        "norm": 1.0,
        "base_norm": None,
        "changed": 6,
        "error": 0.0,
    }
    return fields | changes


def test_the_entry_that_the_others_are_made_of_is_sound() -> None:
    """So that it is their change that is refused."""
    TensorEntry.model_validate_json(json.dumps(entry()))


WRONG_ENTRIES: list[dict[str, Any]] = [
    {"shape": ["2", 3]},
    {"shape": [2.0, 3]},
    {"shape": [True, 3]},
    {"shape": [-1, 3]},
    {"shape": [10**400, 3]},
    {"shape": [2**48, 2**48]},
    {"shape": [2**48, 2**48, 0]},
    {"shape": [1] * 9},
    {"shape": 6},
    {"shape": None},
    {"dtype": "I64"},
    {"dtype": "F8_E4M3"},
    {"dtype": None},
    {"encoding": "magic"},
    {"encoding": "int8", "dtype": "BF16"},
    {"encoding": "int8", "shape": []},
    {"encoding": "lowrank"},
    {"encoding": "lowrank", "scaling": 1.0, "shape": [6]},
    {"encoding": "lowrank", "scaling": 1.0, "dtype": "F16"},
    {"encoding": "lowrank", "scaling": "1"},
    {"encoding": "lowrank", "scaling": True},
    {"scaling": 1.0},
    {"norm": -1.0},
    {"norm": None},
    {"changed": 1.5},
    {"changed": -1},
    {"error": "0"},
    {"extra": 1},
]


@pytest.mark.parametrize("changes", WRONG_ENTRIES, ids=str)
def test_a_wrong_entry_is_refused_with_its_name(folder: Path, changes: dict[str, Any]) -> None:
    """Types, ranges and what does not go together: the tensor is named, nothing is guessed."""
    tensors = fields_of(folder)["tensors"] | {"wrong.weight": entry(**changes)}
    edit_manifest(folder, tensors=tensors)
    with pytest.raises(VectorFormatError, match=r"wrong\.weight"):
        Manifest.read(folder)


@pytest.mark.parametrize("field", ["shape", "dtype", "encoding", "scaling", "norm", "error"])
def test_an_entry_without_one_of_its_fields_is_refused(folder: Path, field: str) -> None:
    """A default of ours is not what the writer said."""
    without = {name: value for name, value in entry().items() if name != field}
    edit_manifest(folder, tensors={"t": without})
    with pytest.raises(VectorFormatError, match=field):
        Manifest.read(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "other"},
        {"format": ["rvec"]},
        {"format_version": 0},
        {"format_version": 2},
        {"format_version": True},
        {"format_version": 1.0},
        {"format_version": "1"},
        {"formula": "tuned + base"},
        {"complete": 1},
        {"tie_word_embeddings": "yes"},
        {"donors": {}},
        {"vocabulary": {"policy": "any", "tuned_rows": None, "base_rows": None}},
        {"vocabulary": {"policy": "strict"}},
        {"tensors": []},
        {"tensors": {"a:b": entry()}},
        {"tensors": {"": entry()}},
        {"tensors": {"a\nb": entry()}},
        {"tensors": {"\x1b[2J": entry()}},
        {"files": None},
        {"lineage": {}},
        {"lineage": [1]},
        {"sketch": {"tensors": {"t": "AAAA"}}},
        {"sketch": {"tensors": {"t": "not base64!"}}},
        {"tokenizer": {"file": "f", "blake3": "0" * 64, "hashes": "AAAA"}},
        {"tokenizer": {"file": "f", "blake3": "0", "hashes": ""}},
        {"surprise": 1},
    ],
    ids=str,
)
def test_what_the_reader_does_not_know_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    """A version, a field, a value from elsewhere: not guessed at."""
    edit_manifest(folder, **changes)
    with pytest.raises(VectorFormatError, match="no manifest that this version reads") as caught:
        Manifest.read(folder)
    assert next(iter(changes)) in str(caught.value)


@pytest.mark.parametrize("field", sorted(set(Manifest.model_fields)))
def test_a_manifest_without_one_of_its_fields_is_refused(folder: Path, field: str) -> None:
    """Nothing is assumed of a file that does not say what it is."""
    fields = fields_of(folder)
    del fields[field]
    (folder / "vector.json").write_text(json.dumps(fields))
    with pytest.raises(VectorFormatError, match=field):
        Manifest.read(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../v.safetensors",
        "/etc/v.safetensors",
        "sub/v.safetensors",
        "v\0.safetensors",
        "v.safetensors\0",
        "v.bin",
        "v\u202e.safetensors",
        "v\ud800.safetensors",
        "v\n.safetensors",
        "",
        "..",
        ".",
    ],
    ids=ascii,
)
def test_a_shard_of_another_place_or_kind_is_refused(folder: Path, name: str) -> None:
    """Shards are in the vector's own folder, and are safetensors."""
    edit_manifest(folder, files={name: {"size_bytes": 1, "blake3": "0" * 64}})
    with pytest.raises(VectorFormatError, match="no manifest that this version reads"):
        Manifest.read(folder)


def test_names_that_are_not_printable_do_not_reach_the_terminal(folder: Path) -> None:
    """An escape sequence in a name is shown, not obeyed."""
    edit_manifest(folder, tensors={"\x1b[2J": entry()})
    with pytest.raises(VectorFormatError) as caught:
        Manifest.read(folder)
    assert "\x1b" not in str(caught.value)
    assert "x1b[2J" in str(caught.value)


@pytest.mark.parametrize("field", ["created", "architecture"])
def test_half_a_surrogate_pair_is_refused(folder: Path, field: str) -> None:
    """It is no text, and could be neither printed nor written again."""
    edit_manifest(folder, **{field: "a\ud800b"})
    with pytest.raises(VectorFormatError, match="no manifest that this version reads"):
        Manifest.read(folder)
    edit_manifest(folder, **{field: "", "tensors": {"a\ud800b": entry()}})
    with pytest.raises(VectorFormatError, match="no manifest that this version reads"):
        Manifest.read(folder)
