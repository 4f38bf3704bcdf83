"""Files are cold when a benchmark says so, and what is read from the disk is counted."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import pytest

from benchmarks.page_cache import cached_share, drop, files_of, read_back, read_from_disk_bytes

if TYPE_CHECKING:
    from pathlib import Path

SIZE_BYTES = 4 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x" * SIZE_BYTES)
    try:
        drop([path])
    except RuntimeError:
        pytest.skip("a filesystem in memory: nothing on it can be cold")
    return path


def test_dropped_files_are_read_from_the_disk(file: Path) -> None:
    """None of its pages stay; reading it fetches all of it, once."""
    assert cached_share(file) == 0
    before = read_from_disk_bytes()
    file.read_bytes()
    assert read_from_disk_bytes() - before >= SIZE_BYTES
    assert cached_share(file) == 1


def test_files_read_back_are_warm(file: Path) -> None:
    """Reading them again fetches nothing."""
    read_back([file])
    before = read_from_disk_bytes()
    file.read_bytes()
    assert read_from_disk_bytes() == before


def test_what_stays_in_memory_is_not_called_cold(file: Path) -> None:
    """A mapping holds its pages."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as held:
        assert held[SIZE_BYTES - 1] == ord("x")
        assert sum(held[:: mmap.PAGESIZE]) > 0
        with pytest.raises(RuntimeError, match="stays in the page cache"):
            drop([file])


def test_the_weights_of_several_folders_are_found(file: Path) -> None:
    """Only safetensors."""
    (file.parent / "vector.json").write_text("{}")
    assert files_of(file.parent, file.parent) == [file, file]
