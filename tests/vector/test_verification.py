"""vllm_rvec.vector.verification and part_checks: what is found in the data, and what remembered."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_vectors import EXAMPLES, edit_manifest, example, redigest, write_vector
from vllm_rvec.checkpoint.cache import cache_folder
from vllm_rvec.errors import VectorCorruptError
from vllm_rvec.vector import VectorReader, verification
from vllm_rvec.vector.encodings import Encoded
from vllm_rvec.vector.encodings.parts import in_memory
from vllm_rvec.vector.layout import INT8, LORA_A, LORA_B, SCALE
from vllm_rvec.vector.verification import examine, verify


@pytest.fixture
def every(tmp_path: Path) -> Path:
    """A vector with every encoding in two shards, of one's own to damage."""
    tensors = {name: example(name) for name in EXAMPLES}
    return write_vector(tmp_path / "every", tensors, shard_bytes=9000)


def damage(folder: Path, part: str, element: int, value: float) -> None:
    """Set one element of a part, and make the digests fit, as a faulty writer would."""
    shard = VectorReader(folder).table[part].shard
    stored = load_file(shard)
    stored[part].view(-1)[element] = value
    save_file(stored, shard)
    redigest(folder)


def test_a_sound_vector_has_no_problems(every: Path) -> None:
    """All files are named with their sizes."""
    found = examine(VectorReader(every))
    assert found.problems == ()
    assert {name: (every / name).stat().st_size for name in found.size_bytes} == found.size_bytes
    assert len(found.size_bytes) == 2


def test_every_byte_of_every_file_counts(every: Path) -> None:
    """One bit, anywhere in a shard, and the file is named; two files are both named."""
    for shard in VectorReader(every).shards:
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    with pytest.raises(VectorCorruptError, match="2 problems") as caught:
        verify(VectorReader(every))
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "vector-00001-of-00002.safetensors",
        "vector-00002-of-00002.safetensors",
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "part",
    [
        "dense_f32",
        "dense_bf16",
        "dense_f16",
        "sparse_bitmap:values",
        "sparse_gaps_u8:values",
        "int8:scale",
        "lowrank:lora_A",
        "lowrank:lora_B",
    ],
)
def test_nan_and_infinity_are_found_in_every_part(every: Path, part: str, value: float) -> None:
    """In the last element as in the first, and whatever the digests say; the tensor is named."""
    damage(every, part, -1, value)
    with pytest.raises(VectorCorruptError, match="NaN or infinity") as caught:
        verify(VectorReader(every))
    assert caught.value.tensor_name == part.partition(":")[0]
    assert caught.value.path == VectorReader(every).table[part].shard


@pytest.mark.parametrize("value", [float(np.finfo(np.float32).max), -1e38, 2.0**-149, -0.0])
def test_the_largest_and_smallest_floats_are_sound(every: Path, value: float) -> None:
    """Only what is no finite number is refused."""
    damage(every, "dense_f32", 2, value)
    assert not examine(VectorReader(every)).problems


def test_all_damaged_tensors_are_named_at_once(every: Path) -> None:
    """And each of them as often as there is something to say."""
    for part in ("dense_f32", "sparse_bitmap:values", "lowrank:lora_B"):
        damage(every, part, 0, float("nan"))
    problems = examine(VectorReader(every)).problems
    assert {problem.tensor_name for problem in problems} == {
        "dense_f32",
        "sparse_bitmap",
        "lowrank",
    }


def int8_of(scale: float, element: int) -> Encoded:
    parts = (
        in_memory(SCALE, torch.tensor([scale])),
        in_memory(INT8, torch.tensor([[element]], dtype=torch.int8)),
    )
    return Encoded("int8", "F32", parts)


@pytest.mark.parametrize(
    ("scale", "element", "is_sound"),
    [(3e36, 100, True), (3e36, -100, True), (3e36, 127, False), (-3e36, -128, False)],
)
def test_an_int8_product_that_overflows_is_found(
    tmp_path: Path, scale: float, element: int, *, is_sound: bool
) -> None:
    """A finite scale times a byte is no finite float32 always."""
    folder = write_vector(tmp_path / "v", {"t": ((1, 1), int8_of(scale, element))})
    decoded = VectorReader(folder).tensor("t")
    assert decoded is not None
    assert bool(torch.isfinite(decoded).all()) == is_sound
    assert bool(examine(VectorReader(folder)).problems) != is_sound


@pytest.mark.parametrize(
    ("scaling", "largest", "is_sound"),
    [(1.0, 1e19, False), (1.0, 1e18, True), (1e308, 1.0, False), (-1e3, 1e18, False)],
)
def test_a_lowrank_product_that_can_overflow_is_found(
    tmp_path: Path, scaling: float, largest: float, *, is_sound: bool
) -> None:
    """By a bound: scaling, the largest element of each factor, and the rank."""
    factor = torch.full((64, 64), largest)
    parts = in_memory(LORA_A, factor), in_memory(LORA_B, factor)
    encoded = Encoded("lowrank", "F32", parts, scaling=scaling)
    folder = write_vector(tmp_path / "v", {"t": ((64, 64), encoded)})
    problems = examine(VectorReader(folder)).problems
    assert [problem.tensor_name for problem in problems] == ([] if is_sound else ["t"])


def test_a_bitmap_that_contradicts_its_values_is_found(every: Path) -> None:
    """A bit too many, and a bit that moved beyond the last element: decoding refuses both too."""
    damage(every, "sparse_bitmap:bitmap", 0, 0xFF)
    problems = [str(problem) for problem in examine(VectorReader(every)).problems]
    assert any("bits for 4 values" in problem for problem in problems)
    damage(every, "sparse_bitmap:bitmap", 0, 0b0010_1010)  # bits 1, 3, 5; 9 is in the next byte
    assert not examine(VectorReader(every)).problems
    damage(every, "sparse_bitmap:bitmap", 1, 0b0000_0100)  # bit 10 of ten elements
    problems = [str(problem) for problem in examine(VectorReader(every)).problems]
    assert any("bits beyond its last element" in problem for problem in problems)
    with pytest.raises(VectorCorruptError, match="sparse_bitmap"):
        VectorReader(every).tensor("sparse_bitmap")


@pytest.mark.parametrize("name", ["sparse_gaps_u8", "sparse_gaps_u16"])
def test_gaps_that_lead_beyond_the_end_are_found(every: Path, name: str) -> None:
    """The last element itself is sound, the one after it is not; decoding agrees."""
    vector = VectorReader(every)
    gaps = vector.part(f"{name}:gaps")
    room = vector.manifest.tensors[name].elements - int(gaps.sum()) - gaps.numel()
    damage(every, f"{name}:gaps", -1, int(gaps[-1]) + room)
    assert not examine(VectorReader(every)).problems
    decoded = VectorReader(every).tensor(name)
    assert decoded is not None
    assert decoded[-1] != 0
    damage(every, f"{name}:gaps", -1, int(gaps[-1]) + room + 1)
    assert "gaps lead beyond" in str(examine(VectorReader(every)).problems[0])
    with pytest.raises(VectorCorruptError, match="gaps lead beyond"):
        VectorReader(every).tensor(name)


@pytest.mark.parametrize("piece_bytes", [8, 24, 64])
def test_pieces_of_any_size_give_the_same_verdict(
    every: Path, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts are read piece by piece; what is at the seams is seen."""
    monkeypatch.setattr(verification, "PIECE_BYTES", piece_bytes)
    assert not examine(VectorReader(every)).problems
    for part in ("sparse_bitmap:bitmap", "dense_bf16", "sparse_gaps_u16:gaps"):
        size = VectorReader(every).part(part).numel()
        for element in {0, size // 2, size - 1}:
            copy = Path(shutil.copytree(every, every.parent / f"{part}{element}"))
            damage(copy, part, element, float("nan") if part == "dense_bf16" else 255)
            problems = examine(VectorReader(copy)).problems
            expected = part != "sparse_gaps_u16:gaps"  # 255 is a gap like another there
            assert bool(problems) == expected, (part, element)


def test_the_verdict_is_remembered_until_a_file_changes(every: Path) -> None:
    """The second look reads no data; a file that was written since is read again."""
    assert not verify(VectorReader(every)).was_remembered
    assert verify(VectorReader(every)).was_remembered
    assert not verify(VectorReader(every), remembered=False).was_remembered
    damage(every, "dense_f32", 0, float("nan"))
    for _ in range(2):  # damage is not remembered
        with pytest.raises(VectorCorruptError):
            verify(VectorReader(every))


def test_another_manifest_over_the_same_files_is_another_vector(every: Path) -> None:
    """The verdict is on both: here a scaling that overflows, under files that did not change."""
    verify(VectorReader(every))
    manifest = VectorReader(every).manifest.model_dump(mode="json")
    manifest["tensors"]["lowrank"]["scaling"] = 1e300
    edit_manifest(every, tensors=manifest["tensors"])
    with pytest.raises(VectorCorruptError, match="factors"):
        verify(VectorReader(every))


@pytest.mark.parametrize("change", ["mtime", "inode"])
def test_a_file_that_was_replaced_is_read_again(every: Path, change: str) -> None:
    """The same size and name do not make it the same file."""
    verify(VectorReader(every))
    shard = VectorReader(every).shards[0]
    before = shard.stat()
    if change == "inode":
        shutil.copy2(shard, every / "copy")
        (every / "copy").replace(shard)
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert not verify(VectorReader(every)).was_remembered


def test_verdicts_of_two_folders_do_not_mix(every: Path, tmp_path: Path) -> None:
    """A copy is looked at for itself."""
    verify(VectorReader(every))
    copy = shutil.copytree(every, tmp_path / "copy")
    assert not verify(VectorReader(copy)).was_remembered
    assert verify(VectorReader(every)).was_remembered


def test_a_file_that_is_cut_off_meanwhile_is_named(every: Path) -> None:
    """Verifying reads, it does not map: no signal ends the process."""
    vector = VectorReader(every)
    shard = vector.shards[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    vector.shards[0].unlink()
    with pytest.raises(VectorCorruptError) as caught:
        verify(vector)
    assert caught.value.problems == (
        f"{vector.shards[0].name}: No such file or directory",
        f"{shard.name}: it was cut off while it was read",
    )


def test_progress_ends_with_all_bytes_done(every: Path) -> None:
    """Every byte is counted once, over all files."""
    seen: list[tuple[int, int]] = []
    verify(VectorReader(every), on_progress=lambda done, total: seen.append((done, total)))
    total = sum(shard.stat().st_size for shard in VectorReader(every).shards)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_what_the_caller_raises_from_progress_ends_the_pass(every: Path) -> None:
    """A cancelled command does not read the rest of a large vector."""

    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(VectorReader(every), on_progress=cancel)
    assert not verify(VectorReader(every)).was_remembered


def test_a_user_without_a_home_can_verify(every: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's random user: the verdict is not remembered, nothing else."""
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder() is None
    for _ in range(2):
        assert not verify(VectorReader(every)).was_remembered


def test_a_cache_that_cannot_be_written_costs_only_the_look(
    every: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container without a writable home serves all the same."""
    blocker = tmp_path / "blocker"
    blocker.write_text("a file, not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocker))
    assert cache_folder() == blocker / "vllm_rvec"
    for _ in range(2):
        assert not verify(VectorReader(every)).was_remembered


def test_a_damaged_cache_is_no_verdict(every: Path) -> None:
    """Whatever stands there, it is not taken for a verdict, and is written anew."""
    verify(VectorReader(every))
    cache = cache_folder()
    assert cache is not None
    stamps = list((cache / "verified").iterdir())
    for stamp in stamps:
        stamp.write_text("{")
    assert not verify(VectorReader(every)).was_remembered
    assert verify(VectorReader(every)).was_remembered


def test_a_vector_of_zeros_is_sound(tmp_path: Path) -> None:
    """It has no file at all."""
    folder = write_vector(tmp_path / "v", {"t": example("zero")})
    assert verify(VectorReader(folder)).size_bytes == {}


def test_verifying_imports_no_torch(every: Path) -> None:
    """`serve`'s parent does it before any engine, and must start fast."""
    code = (
        "import sys; from pathlib import Path\n"
        "from vllm_rvec.vector.reader import VectorReader\n"
        "from vllm_rvec.vector.verification import verify\n"
        f"verify(VectorReader(Path({str(every)!r})), remembered=False)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
