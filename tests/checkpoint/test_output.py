"""vllm_rvec.checkpoint.output: a folder is there whole, or not at all."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.checkpoints import make_vector
from vllm_rvec.checkpoint import output
from vllm_rvec.checkpoint.output import new_folder, replace_durably, write_durably
from vllm_rvec.errors import CheckpointNotFoundError, ConfigError, VectorNotFoundError
from vllm_rvec.vector import VectorReader

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.checkpoints import Family

EXTRACT = """
import sys
from pathlib import Path
from vllm_rvec.vector.extract import extract

def wait(done, total):
    if done > total / 2:
        print("half-way", flush=True)
        sys.stdin.read()

tuned, base, output = map(Path, sys.argv[1:])
extract(tuned, base, output, encoding="dense", on_progress=wait)
"""


@pytest.fixture
def half_way(family: Family, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A real extraction to `tmp_path/v` that stands still when half of it is written."""
    command = [sys.executable, "-c", EXTRACT, str(family.tuned), str(family.base)]
    with subprocess.Popen(
        [*command, str(tmp_path / "v")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "half-way\n"
        yield child
        child.kill()


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".v.unfinished-")]


def test_a_run_that_is_killed_leaves_no_vector_and_the_next_one_says_so(
    half_way: subprocess.Popen[str],
    family: Family,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Killed outright in the middle: no output, remains that no reader takes, and a clean start."""
    half_way.send_signal(signal.SIGKILL)
    half_way.wait()
    assert not (tmp_path / "v").exists()
    with pytest.raises(VectorNotFoundError):
        VectorReader(tmp_path / "v")
    (remains,) = hidden(tmp_path)
    assert sum(path.stat().st_size for path in remains.iterdir()) > 1000
    with pytest.raises(ValueError, match=r"vector\.json"):
        VectorReader(remains)
    with caplog.at_level(logging.WARNING):
        make_vector(family, tmp_path / "v")
    assert "was interrupted; removing" in caplog.text
    assert str(remains) in caplog.text
    assert VectorReader(tmp_path / "v").manifest.tensors
    assert hidden(tmp_path) == []


def test_the_folder_of_a_run_that_lives_is_left_alone(
    half_way: subprocess.Popen[str],
    family: Family,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two runs for one output: each has a folder of its own, and the first to finish has it."""
    (other,) = hidden(tmp_path)
    with caplog.at_level(logging.WARNING):
        make_vector(family, tmp_path / "v")
    assert "Another run" in caplog.text
    assert hidden(tmp_path) == [other]
    assert half_way.poll() is None
    assert half_way.stdin is not None
    half_way.stdin.close()
    assert half_way.wait(60) != 0
    assert VectorReader(tmp_path / "v").manifest.tensors
    assert hidden(tmp_path) == []


def test_a_block_that_succeeds_makes_the_folder(tmp_path: Path) -> None:
    """Under its name, with what was written, and nothing else beside it or in it."""
    with new_folder(tmp_path / "deep" / "v") as folder:
        assert not (tmp_path / "deep" / "v").exists()
        write_durably(folder / "a", b"1")
    assert [path.name for path in (tmp_path / "deep" / "v").iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["v"]
    assert (tmp_path / "deep" / "v").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_a_block_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    """The error goes on as it is."""

    def fail() -> None:
        with new_folder(tmp_path / "v") as folder:
            write_durably(folder / "a", b"1")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_the_outputs_error(tmp_path: Path) -> None:
    """The system's reason is told, and nothing is left."""
    with pytest.raises(ConfigError, match="No space left"), new_folder(tmp_path / "v"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_ours_that_is_an_oserror_says_what_it_says(tmp_path: Path) -> None:
    """A donor that is missing is not an output that can't be written."""
    with pytest.raises(CheckpointNotFoundError, match="no donor"), new_folder(tmp_path / "v"):
        raise CheckpointNotFoundError("no donor")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_exists_is_never_overwritten(tmp_path: Path, kind: str) -> None:
    """Not even a link that leads nowhere."""
    path = tmp_path / "v"
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("precious")
    else:
        path.symlink_to("nowhere")
    with pytest.raises(ConfigError, match="exists already"), new_folder(path):
        pytest.fail("the block ran")
    assert [found.name for found in tmp_path.iterdir()] == ["v"]


def test_remains_of_another_output_are_left_alone(tmp_path: Path) -> None:
    """A name that only begins the same is another's."""
    other = tmp_path / ".v2.unfinished-abc"
    other.mkdir()
    with new_folder(tmp_path / "v"):
        pass
    assert other.is_dir()


def test_a_folder_without_a_lock_is_given_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run makes its folder an instant before its lock; only an old one is a dead one's."""
    young = tmp_path / ".v.unfinished-young"
    young.mkdir()
    with new_folder(tmp_path / "v"):
        pass
    assert young.is_dir()
    os.utime(young, (0, 0))
    (tmp_path / "v").rmdir()
    with new_folder(tmp_path / "v"):
        pass
    assert not young.exists()
    assert output.UNLOCKED_SECONDS > 1


@pytest.mark.parametrize("name", ["v[1]", "v*", "ä b", "-v"])
def test_any_name_will_do(tmp_path: Path, name: str) -> None:
    """Characters that patterns know are characters like others."""
    (tmp_path / f".{name}.unfinished-x").mkdir()
    os.utime(tmp_path / f".{name}.unfinished-x", (0, 0))
    with new_folder(tmp_path / name):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_name_that_can_not_be_is_a_configuration_error(tmp_path: Path) -> None:
    """Too long, or under a file."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / ("x" * 300), tmp_path / "file" / "v"):
        with pytest.raises(ConfigError, match="can't be written"), new_folder(path):
            pytest.fail("the block ran")


def test_a_file_is_written_once(tmp_path: Path) -> None:
    """write_durably creates, it does not replace."""
    write_durably(tmp_path / "a", b"1")
    with pytest.raises(FileExistsError):
        write_durably(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1"


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is left beside it, whether the disk has room or not."""
    path = tmp_path / "a"
    replace_durably(path, b"1")
    replace_durably(path, b"2")
    assert path.read_bytes() == b"2"

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output, "write_durably", full)
    with pytest.raises(OSError, match="No space"):
        replace_durably(path, b"34")
    assert path.read_bytes() == b"2"
    assert list(tmp_path.iterdir()) == [path]


def test_the_slower_of_two_runs_is_told_that_the_output_exists(tmp_path: Path) -> None:
    """Not the system's words for a folder that can't be renamed; the faster one's stays."""
    slower = new_folder(tmp_path / "v")
    slower.__enter__()
    with new_folder(tmp_path / "v") as folder:
        write_durably(folder / "x", b"faster")
    with pytest.raises(ConfigError, match="exists already"):
        slower.__exit__(None, None, None)
    assert (tmp_path / "v" / "x").read_bytes() == b"faster"
    assert hidden(tmp_path) == []


def test_a_file_on_the_way_is_named(tmp_path: Path) -> None:
    """Where a folder should be."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is a file"), new_folder(tmp_path / "file" / "v"):
        pass
