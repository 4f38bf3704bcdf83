"""vllm_rvec.vector.statistics: numbers of a vector, from its manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.checkpoints import tensors
from vllm_rvec.vector import Manifest, TensorEntry, VectorReader
from vllm_rvec.vector.extract import extract
from vllm_rvec.vector.statistics import (
    OTHERS,
    Spectrum,
    Statistics,
    Sums,
    lossy_error,
    make_grid,
    stored_as,
    typical_range,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family


def entry(**changes: object) -> TensorEntry:
    told: dict[str, object] = {"shape": (2, 3), "dtype": "F32", "encoding": "dense"} | changes
    return TensorEntry(**told)  # type: ignore[arg-type]


def manifest_of(vector: Path, entries: dict[str, TensorEntry]) -> Manifest:
    """Give a manifest with other tensors than it has files for: statistics read no files."""
    return Manifest.read(vector).model_copy(update={"tensors": entries})


def test_tensors_are_summed_up_by_squares_not_by_ratios() -> None:
    """3 of 4 and 4 of 400 are 5 of about 400: the mean of the two ratios would be 38 %."""
    sums = Sums()
    sums.add(entry(norm=3.0, base_norm=4.0, changed=6))
    sums.add(entry(shape=(3, 2), norm=4.0, base_norm=400.0, changed=0))
    assert sums.norm == pytest.approx(5)
    assert sums.relative_norm == pytest.approx(5 / 400.02, rel=1e-6)
    assert sums.changed_share == 0.5


def test_what_is_not_known_is_left_out_on_both_sides() -> None:
    """A tensor without a base norm makes no other's relative norm larger.

    The share of changed weights is not known where one tensor's is not: beside the zero tensors of
    an imported adapter, its factors would make it 0 %.
    """
    sums = Sums()
    sums.add(entry(norm=1.0, base_norm=10.0, changed=3))
    sums.add(entry(norm=100.0))
    assert sums.relative_norm == pytest.approx(0.1)
    assert sums.changed_share is None
    assert Sums().relative_norm is None
    assert Sums().changed_share is None


def test_numbers_beyond_a_double_are_none() -> None:
    """What a manifest may claim does not become NaN or infinity in JSON."""
    sums = Sums()
    for _ in range(2):
        sums.add(entry(norm=1.7e308, base_norm=1e-308))
    assert sums.relative_norm is None
    sums.add(entry(norm=1.0, base_norm=0.0))
    assert sums.energy_share(16) is None


def test_energy_is_summed_up_over_matrices() -> None:
    """The rank that keeps 90 % is one for all matrices of a group."""
    sums = Sums()
    sums.add(entry(), Spectrum((8.0, 1.0), 10.0))
    sums.add(entry(), Spectrum((4.0, 4.0, 2.0), 10.0))
    assert sums.energy_share(1) == pytest.approx(12 / 20)
    assert sums.energy_share(64) == pytest.approx(19 / 20)
    assert sums.rank == 3
    sums.add(entry(), Spectrum((1.0,) * 64, 1000.0))
    assert sums.rank is None


def test_the_manifest_gives_what_the_tensors_say(vector: Path) -> None:
    """Norms by kind are those of the data."""
    statistics = Statistics(Manifest.read(vector))
    stored = tensors(vector)
    by_kind = statistics.by_kind()
    squares = sum(float(stored[n].norm()) ** 2 for n in stored if "down_proj" in n)
    assert by_kind["down"].norm == pytest.approx(squares**0.5, rel=1e-5)
    assert sum(sums.tensors for sums in by_kind.values()) == len(stored)
    assert list(by_kind) == [
        *("q", "k", "v", "o", "gate", "up", "down", "norms", "biases", "embedding")
    ]


def test_a_grid_has_every_tensor_once(vector: Path) -> None:
    """Layers by kinds, and what is outside them apart."""
    statistics = Statistics(Manifest.read(vector))
    grid = make_grid(statistics, 32, 12)
    assert grid.rows == ("0", "1")
    assert set(grid.outside) == {"embedding", "norms"}
    cells = [*grid.cells.values(), *grid.outside.values()]
    assert sum(sums.weights for sums in cells) == statistics.total().weights
    assert sum(sums.weights for sums in grid.by_row.values()) == sum(
        sums.weights for sums in grid.by_kind.values()
    )


def test_many_layers_share_rows_and_many_kinds_a_column(vector: Path) -> None:
    """A grid stays small enough to be looked at, and drops nothing."""
    entries = {
        f"layers.{layer}.kind{kind}.weight": entry(shape=(kind + 1,), norm=1.0, base_norm=2.0)
        for layer in (*range(0, 160, 2), 999_999)
        for kind in range(20)
    }
    grid = make_grid(Statistics(manifest_of(vector, entries)), 32, 5)
    assert len(grid.rows) == 27
    assert (grid.rows[0], grid.rows[-1]) == ("0-4", "156-999999")
    assert grid.kinds == ("kind16", "kind17", "kind18", "kind19", OTHERS)
    assert sum(sums.tensors for sums in grid.cells.values()) == 81 * 20
    assert grid.cells[0, OTHERS].relative_norm == pytest.approx(0.5)


def test_bytes_by_encoding_are_those_of_the_shards(family: Family, tmp_path: Path) -> None:
    """Every stored byte belongs to one encoding."""
    extract(family.tuned, family.base, tmp_path / "v", encoding="lowrank", rank=4)
    reader = VectorReader(tmp_path / "v")
    found = stored_as(reader)
    assert {item.encoding for item in found} >= {"lowrank"}
    assert sum(item.size_bytes for item in found) == sum(
        info.size_bytes for info in reader.table.values()
    )
    assert sum(item.tensors for item in found) == len(reader.manifest.tensors)


def test_the_loss_of_all_tensors_follows_from_the_manifest(family: Family, tmp_path: Path) -> None:
    """As `extract` measured it, for each lossy encoding."""
    for encoding in ("lowrank", "int8"):
        made = extract(family.tuned, family.base, tmp_path / encoding, encoding=encoding, rank=4)
        lossy = lossy_error(made.manifest)
        assert lossy.overall == pytest.approx(made.error, rel=1e-3)
        assert lossy.worst_tensor is not None
        assert lossy.worst == made.manifest.tensors[lossy.worst_tensor].error


def test_a_lossless_vector_lost_nothing(vector: Path) -> None:
    """Nothing lost, nobody to blame."""
    assert lossy_error(Manifest.read(vector)) == (0.0, 0.0, None)


def test_few_weights_do_not_stretch_a_scale() -> None:
    """Norms and biases lie decades apart from the matrices; one value is a range too."""
    cells = [(1e-6, 10), (0.1, 5000), (0.2, 5000), (50.0, 10), (None, 10**9), (0.0, 10**9)]
    assert typical_range(cells) == (0.1, 0.2)
    assert typical_range([(0.3, 1)]) == (0.3, 0.3)
    assert typical_range([]) == (1.0, 1.0)
