"""vllm_rvec.cli.verify: the command around `examine`."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
import typer
from typer.testing import CliRunner

from tests.support.tiny_vectors import EXAMPLES, example, redigest, write_vector
from vllm_rvec.cli.main import EXIT_CODES, exit_code
from vllm_rvec.cli.verify import verify_command
from vllm_rvec.errors import RvecError, VectorCorruptError, VectorFormatError
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.verification import verify

if TYPE_CHECKING:
    from pathlib import Path

app = typer.Typer()
app.command()(verify_command)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A vector with every encoding in two shards."""
    tensors = {name: example(name) for name in EXAMPLES}
    return write_vector(tmp_path / "v", tensors, shard_bytes=9000)


def run(*arguments: object) -> tuple[str, RvecError | None]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, RvecError), done.exception
    return done.stdout, done.exception


def damage(folder: Path) -> str:
    """Put a NaN into the first tensor, and break the second shard's digest."""
    first, second = VectorReader(folder).shards
    info = VectorReader(folder).table["dense_f32"]
    data = bytearray(first.read_bytes())
    data[info.offset_bytes : info.offset_bytes + 4] = b"\xff\xff\xff\x7f"
    first.write_bytes(data)
    redigest(folder)
    data = bytearray(second.read_bytes())
    data[-1] ^= 1
    second.write_bytes(data)
    return second.name


def test_a_sound_vector_is_shown_file_by_file(folder: Path) -> None:
    """Every shard with its size and verdict."""
    shown, error = run(folder)
    assert error is None
    assert shown.count("│ sound") == 2
    for shard in VectorReader(folder).shards:
        assert shard.name in shown


def test_damage_is_shown_and_exits_with_its_own_status(folder: Path) -> None:
    """The table names what is wrong with each file; the error follows it."""
    second = damage(folder)
    shown, error = run(folder)
    assert "dense_f32: NaN or infinity" in " ".join(shown.split())
    assert second in shown
    assert isinstance(error, VectorCorruptError)
    assert exit_code(error) == EXIT_CODES[VectorCorruptError] == 6


def test_json_is_for_machines(folder: Path) -> None:
    """One object, of a damaged vector too."""
    assert json.loads(run(folder, "--json")[0])["sound"] is True
    second = damage(folder)
    shown, error = run(folder, "--json")
    facts = json.loads(shown)
    assert error is not None
    assert facts["sound"] is False
    assert facts["tensors"] == len(EXAMPLES)
    assert [len(file["problems"]) for file in facts["files"].values()] == [1, 1]
    assert facts["files"][second]["size_bytes"] == (folder / second).stat().st_size


def test_what_is_no_vector_exits_with_another_status(tmp_path: Path) -> None:
    """An empty folder, and none at all."""
    for path in (tmp_path, tmp_path / "nowhere"):
        _, error = run(path)
        assert isinstance(error, VectorFormatError)
        assert exit_code(error) == EXIT_CODES[VectorFormatError] == 5


def test_the_command_never_trusts_an_earlier_verdict(folder: Path) -> None:
    """It reads everything each time; what it finds sound, others need not read again."""
    run(folder)
    vector = VectorReader(folder)
    assert verify(vector).was_remembered
    shard = vector.shards[0]
    before = shard.stat()
    with shard.open("r+b") as file:  # as a failing disk would: no new modification time
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert verify(VectorReader(folder)).was_remembered
    assert isinstance(run(folder)[1], VectorCorruptError)


def test_a_vector_of_zeros_has_no_file_to_read(tmp_path: Path) -> None:
    """And is sound."""
    shown, error = run(write_vector(tmp_path / "v", {"t": example("zero")}))
    assert error is None
    assert "all its tensors are zero" in " ".join(shown.split())
