"""Whether stored files are still the same."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from vllm_rvec.checkpoint.stamps import FileStamps

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("not looked at")
    return tmp_path


def test_nothing_has_changed(folder: Path) -> None:
    """Also when what is neither weights nor configuration has."""
    stamps = FileStamps.take([folder])
    (folder / "README.md").write_text("new text")
    assert stamps.problems() == []


def test_each_change_is_named(folder: Path) -> None:
    """Removed, new, rewritten at the same size, and put in another's place."""
    (folder / "b.json").write_text("{}")
    stamps = FileStamps.take([folder])
    (folder / "b.json").unlink()
    (folder / "c.json").write_text("{}")
    os.utime(folder / "config.json", ns=(0, 0))
    other = folder / "other"
    stat = (folder / "model.safetensors").stat()
    other.write_bytes(b"weighty")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.rename(folder / "model.safetensors")
    assert stamps.problems() == [
        f"{folder / 'b.json'}: removed",
        f"{folder / 'c.json'}: new",
        f"{folder / 'config.json'}: changed",
        f"{folder / 'model.safetensors'}: changed",
    ]


def test_a_link_is_what_it_leads_to(folder: Path, tmp_path: Path) -> None:
    """The Hub's cache is made of links."""
    blob = tmp_path / "blob"
    blob.write_bytes(b"1")
    (folder / "link.safetensors").symlink_to(blob)
    stamps = FileStamps.take([folder])
    blob.write_bytes(b"12")
    assert stamps.problems() == [f"{folder / 'link.safetensors'}: changed"]


def test_a_folder_that_is_gone_is_one_problem(folder: Path, tmp_path: Path) -> None:
    """Not a silent absence of files."""
    stamps = FileStamps.take([folder])
    moved = folder.rename(tmp_path.with_name("moved"))
    (problem,) = stamps.problems()
    assert "No such file" in problem
    moved.rename(folder)
