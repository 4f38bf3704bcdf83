"""vllm_rvec.vector.merged_shards: the target's own files, with sums in them."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from tests.support.checkpoints import tensors
from vllm_rvec.checkpoint.table import read_header
from vllm_rvec.vector.extract import extract
from vllm_rvec.vector.merge import merge
from vllm_rvec.vector.summing import PIECE_BYTES, Piece, SumWriter

Tensors = dict[str, torch.Tensor]


def write_checkpoint(folder: Path, weights: Tensors) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "architectures": ["Own"]}))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt", "own": "kept"})
    return folder


def odd_weights(seed: int) -> Tensors:
    """Tensors of every kind that a checkpoint may hold."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    many = 3 * PIECE_BYTES // 2 // 1001 + 7
    return {
        "z.first.weight": normal(16, 8).bfloat16(),
        "a.wide.weight": normal(5, 9),
        "b.half.weight": normal(3, 7).half(),
        "c.pieces.weight": normal(many, 1001).bfloat16(),
        "d.scalar": normal(),
        "e.empty": normal(0, 4).bfloat16(),
        "f.odd": normal(3).bfloat16(),
        "g.integers": torch.arange(5),
        "h.bytes": torch.arange(3, dtype=torch.uint8),
    }


def sums(theta: Tensors, v: Tensors, alpha: float) -> Tensors:
    """The reference formula, for what the vector holds."""
    factor = torch.tensor(alpha, dtype=torch.float32)
    return {
        n: (t.float() + factor * v[n].float()).to(t.dtype) if n in v else t
        for n, t in theta.items()
    }


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        left, right = (
            t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, expected[name])
        )
        assert torch.equal(left, right), name


@pytest.fixture
def odd_family(tmp_path: Path) -> tuple[Path, Path]:
    """A target and a vector with tensors of every kind."""
    base, step, other = (odd_weights(seed) for seed in range(3))
    tuned, target = (
        {n: t + s[n] / 64 if t.is_floating_point() else t for n, t in base.items()}
        for s in (step, other)
    )
    donors = [write_checkpoint(tmp_path / n, w) for n, w in (("tuned", tuned), ("base", base))]
    vector = extract(donors[0], donors[1], tmp_path / "vector", encoding="dense").output
    return write_checkpoint(tmp_path / "target", target), vector


def header_of(shard: Path) -> bytes:
    data = shard.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


@pytest.mark.parametrize("alpha", [0.3, -1.0])
def test_every_kind_of_tensor_is_the_references_bit_for_bit(
    odd_family: tuple[Path, Path], alpha: float, tmp_path: Path
) -> None:
    """Scalars, empty ones, more than a piece, three dtypes; integers and bytes are copied."""
    target, vector = odd_family
    merged = merge(target, [vector], tmp_path / "out", alphas=[alpha])
    found = tensors(merged.output)
    assert_same(found, sums(tensors(target), tensors(vector), alpha))
    assert merged.changed_tensors == len(tensors(vector))
    assert not torch.equal(found["c.pieces.weight"][-1], tensors(target)["c.pieces.weight"][-1])


def test_header_order_metadata_and_size_are_the_targets(
    odd_family: tuple[Path, Path], tmp_path: Path
) -> None:
    """Byte for byte: names, order, dtypes, offsets, and what someone wrote beside them."""
    target, vector = odd_family
    out = merge(target, [vector], tmp_path / "out").output
    ours, theirs = (folder / "model.safetensors" for folder in (out, target))
    assert header_of(ours) == header_of(theirs)
    assert ours.stat().st_size == theirs.stat().st_size
    with safe_open(ours, framework="pt") as file:
        assert file.metadata()["own"] == "kept"


def test_alpha_zero_is_the_target_byte_for_byte(
    odd_family: tuple[Path, Path], tmp_path: Path
) -> None:
    """Nothing is computed: a NaN's payload in the target survives, too."""
    target, vector = odd_family
    shard = target / "model.safetensors"
    data, info = bytearray(shard.read_bytes()), read_header(shard)["f.odd"]
    data[info.offset_bytes : info.offset_bytes + info.size_bytes] = b"\xff" * info.size_bytes
    shard.write_bytes(data)
    merged = merge(target, [vector, vector], tmp_path / "out", alphas=[0.0, -0.0])
    assert (merged.output / "model.safetensors").read_bytes() == bytes(data)
    assert merged.changed_tensors == 0


def test_a_file_without_alignment_is_merged(odd_family: tuple[Path, Path], tmp_path: Path) -> None:
    """Old writers put tensors at odd offsets."""
    target, vector = odd_family
    data = save(tensors(target), metadata={"format": "pt"})
    length = int.from_bytes(data[:8], "little")
    shifted = (length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :]
    (target / "model.safetensors").write_bytes(shifted)
    out = merge(target, [vector], tmp_path / "out", alphas=[0.3]).output
    assert_same(tensors(out), sums(tensors(target), tensors(vector), 0.3))


def test_threads_and_progress(odd_family: tuple[Path, Path], tmp_path: Path) -> None:
    """Progress counts all bytes; torch's own threads are as many as before."""
    target, vector = odd_family
    before, calls = torch.get_num_threads(), list[tuple[int, int]]()
    merged = merge(target, [vector], tmp_path / "out", on_progress=lambda *done: calls.append(done))
    assert calls == sorted(calls)
    assert calls[-1] == (merged.size_bytes, (target / "model.safetensors").stat().st_size)
    assert {total for _, total in calls} == {merged.size_bytes}
    assert torch.get_num_threads() == before


def test_after_an_error_no_thread_writes_any_more(
    odd_family: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descriptor may be another file's by then."""
    target, vector = odd_family
    files_are_open, write, number = [], SumWriter._write, itertools.count()

    def slow(self: SumWriter, piece: Piece) -> bool:
        time.sleep(0.2 * (next(number) > 0))  # the first ends before the others
        files_are_open.append(Path(f"/proc/self/fd/{piece.sink}").exists())
        return write(self, piece)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt(f"{done} of {total}")

    monkeypatch.setattr(SumWriter, "_write", slow)
    monkeypatch.setattr("vllm_rvec.vector.summing.QUEUED_PER_THREAD", 1)
    with pytest.raises(KeyboardInterrupt):
        merge(target, [vector], tmp_path / "out", on_progress=stop)
    assert files_are_open
    assert all(files_are_open)
    assert not any(tmp_path.glob(".out*"))


MEASURE = """
import sys
from pathlib import Path
from vllm_rvec.vector.merge import merge

def peak_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith("VmHWM"))

folder = Path(sys.argv[1])
peaks = []
for name in ("small", "large"):
    merge(folder / name, [folder / f"{name}-vector"], folder / f"{name}-out", alphas=[0.3])
    peaks.append(peak_bytes())
print(peaks[1] - peaks[0])
"""


def test_memory_does_not_grow_with_a_dense_merge(tmp_path: Path) -> None:
    """A tensor of 64 MB and its part of 128 MB are merged in a few MB more than small ones."""
    for name, rows in (("small", 64), ("large", 1 << 15)):
        base = {"w": torch.full((rows, 1024), 0.5).bfloat16()}
        tuned = {"w": base["w"] + 0.25}
        folders = [
            write_checkpoint(tmp_path / f"{name}{kind}", weights)
            for kind, weights in (("-tuned", tuned), ("-base", base), ("", base))
        ]
        extract(folders[0], folders[1], tmp_path / f"{name}-vector", encoding="dense")
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) < 96 << 20, done.stdout
    assert_same(
        tensors(tmp_path / "large-out"), {"w": torch.full((1 << 15, 1024), 0.575).bfloat16()}
    )
