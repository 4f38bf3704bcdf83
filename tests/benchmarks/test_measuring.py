"""The benchmarks of real loads run, on a model so small that it takes seconds."""

from __future__ import annotations

import re
import subprocess
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks import load_profile, load_time
from benchmarks.__main__ import BENCHMARKS
from benchmarks.files import Files
from benchmarks.load_profile import REST, Profile, draw
from benchmarks.loading import Way, started
from benchmarks.page_cache import drop, files_of
from vllm_rvec.vector.reader import VectorReader

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    folder = tmp_path_factory.mktemp("bench")
    with Files.made(str(folder), layers=1, shape="tiny") as made:
        yield made


def test_files_are_made_once_and_of_one_shape(files: Files) -> None:
    """Another shape in the same folder is refused."""
    stamp = (files.target / "model.safetensors").stat().st_mtime_ns
    with Files.made(str(files.folder), layers=1, shape="tiny") as again:
        assert (again.target / "model.safetensors").stat().st_mtime_ns == stamp
    with (
        pytest.raises(ValueError, match="not of"),
        Files.made(str(files.folder), layers=2, shape="tiny"),
    ):
        pass


def test_vectors_are_what_their_rows_say(files: Files) -> None:
    """Matrices of the int8 vector are int8; the sparse one changes a tenth of the weights."""
    dense, sparse, int8 = (VectorReader(files.vector(k)) for k in ("dense", "sparse", "int8"))
    assert {(e.encoding, e.dtype) for e in dense.manifest.tensors.values()} == {("dense", "BF16")}
    matrices = [entry for entry in int8.manifest.tensors.values() if len(entry.shape) == 2]
    assert {entry.encoding for entry in matrices} == {"int8"}
    entries = sparse.manifest.tensors.values()
    changed = sum(e.changed or 0 for e in entries) / sum(e.elements for e in entries)
    assert changed == pytest.approx(0.1, abs=0.01)
    assert files.largest_tensor_bytes == 256 * 64 * 2


def test_warm_loads_are_compared_with_plain(files: Files) -> None:
    """A row for each goal, and the figures that `on_paper` takes."""
    rows = load_time.measure(files, 2)
    assert [row.goal for row in rows] == [goal for goal, _ in load_time.GOALS.values()]
    assert all(len(row.rounds) == 2 and min(row.rounds) > 0 for row in rows)
    assert all(row.figures["plain_bytes_per_second"] > 0 for row in rows)


def test_a_child_loads_when_told_and_says_what_it_read(files: Files) -> None:
    """Cold first, then warm; fused."""
    weights = files_of(files.target, files.vector("dense"))
    with started(files, Way.fused(files.vector("dense")), loads=2) as loader:
        drop(weights)
        cold, warm = loader.load(), loader.load()
    # Neighbours share pages with the headers: a file may have been read in part already.
    assert cold.read_bytes >= 0.9 * sum(path.stat().st_size for path in weights)
    assert warm.read_bytes == 0
    assert cold.seconds > 0
    assert loader.start_seconds > cold.seconds


def test_a_child_that_fails_is_no_measurement(tmp_path: Path) -> None:
    """Its parent says so, and does not wait."""
    nothing = Files(tmp_path, 1, shape="tiny")
    with pytest.raises(RuntimeError, match="ended with status 1"), started(nothing, Way()):
        pass


def test_a_profile_accounts_for_the_whole_load(files: Files) -> None:
    """Stages add up to the load, and none is negative."""
    profiles = load_profile.measure(files, 1)
    assert list(profiles) == ["plain", "dense", "sparse", "int8"]
    for profile in profiles.values():
        assert {"attention", "embedding", "norms", REST} <= profile.seconds.keys()
        assert min(profile.seconds.values()) >= 0


def test_the_same_figures_draw_the_same_picture(tmp_path: Path) -> None:
    """So that a change of the committed picture is a change of the figures."""
    profiles = {"plain": Profile({"attention": 0.1, REST: 0.01})}
    for name in ("a.svg", "b.svg"):
        draw(profiles, "title", tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "attention" in (tmp_path / "a.svg").read_text()


def test_the_committed_picture_is_small() -> None:
    """It is in every clone."""
    assert load_profile.IMAGE.stat().st_size < 60_000


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_in_the_readme_and_runs_alone(name: str) -> None:
    """By its name; what it measures stands in its docstring."""
    module = import_module(f"benchmarks.{name}")
    assert f"benchmarks.{name}" in (module.__doc__ or "")
    assert f"`{name}`" in (ROOT / "benchmarks" / "README.md").read_text()
    assert callable(module.measure)


def test_make_targets_name_modules_that_exist() -> None:
    """`make -n` says what would run."""
    for target in ("bench", "bench-dial", "bench-gpu", "bench-paper", "profile"):
        command = ["make", "-n", target, "-o", "setup"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        (module,) = re.findall(r"-m (benchmarks\S*)", done.stdout)
        name = module.replace(".", "/")
        assert (ROOT / f"{name}.py").exists() or (ROOT / name / "__main__.py").exists()
