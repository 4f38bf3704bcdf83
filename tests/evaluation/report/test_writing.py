"""vllm_rvec.evaluation.report.writing: each file whole or not there."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from vllm_rvec.checkpoint import output
from vllm_rvec.errors import ConfigError
from vllm_rvec.evaluation.report import write_reports

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_rvec.evaluation.results import SweepResults


def test_three_files_are_written_and_nothing_else(results: SweepResults, tmp_path: Path) -> None:
    """Into a folder that is made for them."""
    paths = write_reports(results, tmp_path / "deep" / "folder")
    assert [path.name for path in paths] == ["report.html", "report.md", "report.json"]
    assert sorted(paths[0].parent.iterdir()) == sorted(paths)
    assert json.loads(paths[2].read_text())["version"] == 1


def test_the_same_results_give_the_same_bytes(results: SweepResults, tmp_path: Path) -> None:
    """No time, no host, no order of a set."""
    one, other = (write_reports(results, tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


def test_hostile_texts_are_written(hostile: SweepResults, tmp_path: Path) -> None:
    """A lone surrogate in a model's answer is no reason to lose the report."""
    assert all(path.stat().st_size for path in write_reports(hostile, tmp_path))


def test_a_failure_leaves_the_old_report_whole(
    results: SweepResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills while a file is written: the old one stays, no half one beside it."""
    write_reports(results, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output, "write_durably", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        write_reports(results, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_in_the_way_is_said(results: SweepResults, tmp_path: Path) -> None:
    """Not a traceback."""
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="can't be written"):
        write_reports(results, tmp_path / "taken")
