"""vllm_rvec.vector.derive.writing and inputs: what all derived vectors have in common."""

from __future__ import annotations

import shutil
import threading
from typing import TYPE_CHECKING

import blake3
import pytest
import torch
from safetensors.torch import load_file

from tests.support.vectors import decoded, random_tensor, store_vector
from vllm_rvec.checkpoint.fetch import Located
from vllm_rvec.errors import ConfigError, VectorCorruptError, VectorNotFoundError
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.derive.combine import Term, combine
from vllm_rvec.vector.derive.inputs import VectorInput
from vllm_rvec.vector.derive.random_like import random_like
from vllm_rvec.vector.derive.transform import transform

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vllm_rvec.vector.derive.writing import Derivation

    Make = Callable[..., Derivation]


def by_transform(vector: Path, output: Path, **options: object) -> Derivation:
    return transform(vector, output, rescale=0.5, **options)  # type: ignore[arg-type]


def by_combine(vector: Path, output: Path, **options: object) -> Derivation:
    return combine([Term(vector, 0.5)], output, **options)  # type: ignore[arg-type]


def by_random_like(vector: Path, output: Path, **options: object) -> Derivation:
    return random_like(vector, output, seed=1, **options)  # type: ignore[arg-type]


every_command = pytest.mark.parametrize("make", [by_transform, by_combine, by_random_like])


@every_command
def test_what_is_known_of_the_donors_is_carried_over(
    make: Make, vector: Path, tmp_path: Path
) -> None:
    """The manifest differs in tensors, files, round trip, lineage and date only."""
    made = make(vector, tmp_path / "w")
    found, before = (VectorReader(f).manifest.model_dump() for f in (tmp_path / "w", vector))
    fresh = {"tensors", "files", "roundtrip", "lineage", "created", "tool", "digest"}
    assert {k: v for k, v in found.items() if k not in fresh} == {
        k: v for k, v in before.items() if k not in fresh
    }
    assert found["roundtrip"] is None
    assert before["roundtrip"] is not None
    assert made.manifest.tensors == VectorReader(tmp_path / "w").manifest.tensors


@every_command
def test_the_lineage_gets_a_step_with_the_digest_of_its_input(
    make: Make, vector: Path, tmp_path: Path
) -> None:
    """Steps of before stay; nothing in it names a folder of this machine."""
    make(vector, tmp_path / "w")
    make(tmp_path / "w", tmp_path / "x")
    first, second = VectorReader(tmp_path / "x").manifest.lineage
    assert first == VectorReader(tmp_path / "w").manifest.lineage[0]
    for step, read in ((first, vector), (second, tmp_path / "w")):
        digest = blake3.blake3((read / "vector.json").read_bytes()).hexdigest()
        assert step.inputs == (digest,)
        assert step.parameters
    assert str(tmp_path) not in (tmp_path / "x" / "vector.json").read_text()


@every_command
def test_entries_describe_what_is_stored(make: Make, vector: Path, tmp_path: Path) -> None:
    """Norm and changed are those of the result, no error of before; the base's norm stays."""
    make(vector, tmp_path / "w")
    before, found = VectorReader(vector).manifest, VectorReader(tmp_path / "w").manifest
    for name, v in decoded(tmp_path / "w").items():
        entry = found.tensors[name]
        assert entry.norm == pytest.approx(v.double().norm().item(), rel=1e-5)
        assert entry.changed == int(v.count_nonzero())
        assert entry.error == 0
        assert entry.base_norm == before.tensors[name].base_norm


@every_command
def test_zero_tensors_and_integers_stay_zero(make: Make, tmp_path: Path) -> None:
    """Of the dtype that they had."""
    v = store_vector(tmp_path / "v", {"a": torch.zeros(4, 4), "i": None, "w": random_tensor(4, 4)})
    make(v, tmp_path / "w")
    tensors = VectorReader(tmp_path / "w").manifest.tensors
    assert {n: (e.encoding, e.dtype) for n, e in tensors.items() if n != "w"} == {
        "a": ("zero", "F32"),
        "i": ("zero", "I64"),
    }
    assert set(decoded(tmp_path / "w")) == {"w"}


@every_command
@pytest.mark.parametrize("encoding", ["dense", "sparse", "int8", "lowrank"])
def test_the_encoding_can_be_chosen(
    make: Make, vector: Path, tmp_path: Path, encoding: str
) -> None:
    """As in extract: it is in the entries, its error too, and in the lineage."""
    made = make(vector, tmp_path / "w", encoding=encoding, rank=2)
    entries = made.manifest.tensors
    assert entries["model.layers.0.mlp.up_proj.weight"].encoding == encoding
    is_lossy = encoding in {"int8", "lowrank"}
    assert (entries["model.layers.0.mlp.up_proj.weight"].error > 0) == is_lossy
    assert made.step.parameters["encoding"] == encoding


@every_command
def test_the_dtype_can_be_chosen(make: Make, vector: Path, tmp_path: Path) -> None:
    """A dense vector of 16 bits is plain safetensors of half the size."""
    made = make(vector, tmp_path / "w", encoding="dense", dtype="bfloat16")
    stored = load_file(tmp_path / "w" / "vector.safetensors")
    assert {v.dtype for v in stored.values()} == {torch.bfloat16}
    assert made.step.parameters["dtype"] == "bfloat16"


@every_command
@pytest.mark.parametrize("options", [{"encoding": "zip"}, {"dtype": "int4"}, {"rank": 0}])
def test_a_choice_that_does_not_exist_is_refused(
    make: Make, vector: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    """Before anything is written."""
    with pytest.raises(ConfigError, match=str(*options.values())):
        make(vector, tmp_path / "w", **options)
    assert not list(tmp_path.iterdir())


@every_command
def test_progress_counts_weights(make: Make, vector: Path, tmp_path: Path) -> None:
    """Up to all of them, tensor by tensor."""
    seen: list[tuple[int, int]] = []
    make(vector, tmp_path / "w", on_progress=lambda done, total: seen.append((done, total)))
    entries = VectorReader(vector).manifest.tensors.values()
    total = sum(entry.elements for entry in entries)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)
    assert len(seen) == len(entries)


@every_command
def test_an_interrupted_run_leaves_nothing(make: Make, vector: Path, tmp_path: Path) -> None:
    """Neither a vector nor remains, and no threads."""
    before = threading.active_count()

    def interrupt(done: int, total: int) -> None:
        if done * 2 > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(vector, tmp_path / "w", on_progress=interrupt)
    assert not list(tmp_path.iterdir())
    assert threading.active_count() == before


@every_command
def test_an_output_that_exists_is_refused(make: Make, vector: Path, tmp_path: Path) -> None:
    """Above all the input itself."""
    with pytest.raises(ConfigError, match="exists already"):
        make(vector, vector)
    with pytest.raises(VectorNotFoundError):
        make(tmp_path / "none", tmp_path / "w")


@every_command
def test_damage_is_not_given_digests_of_its_own(make: Make, vector: Path, tmp_path: Path) -> None:
    """A bit that flipped in the input would be sound in the result."""
    copy = shutil.copytree(vector, tmp_path / "v")
    shard = copy / "vector.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(VectorCorruptError):
        make(copy, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_nan_is_refused_with_its_tensor(tmp_path: Path) -> None:
    """Also where the digests are in order."""
    bad = random_tensor(4, 4)
    bad[1, 1] = float("nan")
    v = store_vector(tmp_path / "v", {"good": random_tensor(4, 4), "bad": bad}, encoding="dense")
    with pytest.raises(VectorCorruptError, match="bad"):
        transform(v, tmp_path / "w", density=0.5)


def test_a_result_that_overflows_is_refused(tmp_path: Path) -> None:
    """In float32, or in the dtype asked for; with the way out."""
    v = store_vector(tmp_path / "v", {"w": torch.full((4, 4), 1e38)})
    with pytest.raises(ConfigError, match="smaller factors"):
        transform(v, tmp_path / "w", rescale=10.0)
    with pytest.raises(ConfigError, match="--dtype float32"):
        transform(v, tmp_path / "w", rescale=0.5, dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_inputs_dtype_is_kept_where_it_is_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    """Half of a 16-bit number has 16 bits; a third has not, and gets 32."""
    v = store_vector(tmp_path / "v", {"w": torch.linspace(1, 2, 64).to(dtype)}, encoding="dense")
    transform(v, tmp_path / "half", rescale=0.5, encoding="dense")
    transform(v, tmp_path / "third", rescale=1 / 3, encoding="dense")
    assert decoded(tmp_path / "half")["w"].dtype == dtype
    assert decoded(tmp_path / "third")["w"].dtype == torch.float32


def test_a_hub_vector_is_named_with_its_commit(vector: Path, tmp_path: Path) -> None:
    """In the parameters of combine; a local one by its folder's name."""
    made = combine(
        [Term(Located(vector, "team/v", "c0ffee"), 1.0), Term(vector, 2)], tmp_path / "w"
    )
    assert made.step.parameters == {"1": "team/v@c0ffee:1.0", "2": f"{vector.name}:2"}


def test_a_large_vector_is_read_in_file_order_and_spread_over_shards(
    vector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result of many shards is that of one."""
    monkeypatch.setattr("vllm_rvec.vector.writer.MAX_SHARD_BYTES", 100_000)
    by_combine(vector, tmp_path / "many")
    monkeypatch.undo()
    by_combine(tmp_path / "many", tmp_path / "again")
    read = VectorInput(tmp_path / "many")
    names = read.names_in_file_order()
    assert len(read.reader.shards) > 2
    assert sorted(names) == sorted(read.manifest.tensors)
    table = read.reader.table
    places = [(info.shard, info.offset_bytes) for n in names if (info := table.get(n))]
    assert len(places) > 20
    assert places == sorted(places)
    halved = {name: v * 0.25 for name, v in decoded(vector).items()}
    for name, v in decoded(tmp_path / "again").items():
        assert torch.equal(v.float(), halved[name])
