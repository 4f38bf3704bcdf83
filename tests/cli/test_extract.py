"""vllm_rvec.cli.extract: the command around `extract`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.support.checkpoints import make_checkpoint
from vllm_rvec.vector import VectorReader

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_rvec", "extract", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_vector_is_made_and_told_about(family: Family, tmp_path: Path) -> None:
    """The table is on stdout, progress is not."""
    done = run("--tuned", family.tuned, "--base", family.base, "--output", tmp_path / "v")
    assert done.returncode == 0, done.stderr
    assert "base + v is tuned" in done.stdout
    assert "bit for bit" in done.stdout
    assert VectorReader(tmp_path / "v").manifest.tensors


def test_json_is_for_machines(family: Family, tmp_path: Path) -> None:
    """One object, and nothing else on stdout."""
    output = tmp_path / "v"
    donors = ("--tuned", family.tuned, "--base", family.base)
    done = run(*donors, "--output", output, "--dtype", "bfloat16", "--json")
    made = json.loads(done.stdout)
    assert made["output"] == str(output)
    assert made["tensors"] == 26
    assert 0 < made["relative_norm"] < 1
    assert made["roundtrip"]["exact"] <= made["roundtrip"]["weights"] == made["elements"]
    assert sum(made["encodings"].values()) == 26
    assert made["size_bytes"] == (output / "vector.safetensors").stat().st_size


def test_donors_that_do_not_match_exit_with_4(family: Family, tmp_path: Path) -> None:
    """Nothing is written."""
    done = run("--tuned", family.tuned, "--base", tmp_path / "x", "--output", tmp_path / "v")
    assert done.returncode == 4
    assert "there is no checkpoint folder" in done.stderr
    assert not (tmp_path / "v").exists()


def test_an_existing_output_exits_with_3(family: Family, vector: Path) -> None:
    """A vector is never overwritten."""
    done = run("--tuned", family.tuned, "--base", family.base, "--output", vector)
    assert done.returncode == 3
    assert "exists already" in done.stderr


def test_equal_donors_are_pointed_out(family: Family, tmp_path: Path) -> None:
    """One folder given twice makes a vector that adds nothing: stderr says so."""
    done = run("--tuned", family.base, "--base", family.base, "--output", tmp_path / "v", "--json")
    assert json.loads(done.stdout)["changed_elements"] == 0
    assert done.stderr == "warning: the donors are equal in every weight: the vector is zero\n"


def test_donors_of_two_initialisations_are_pointed_out(family: Family, tmp_path: Path) -> None:
    """Their difference is no tuning; those of one initialisation get no warning."""
    other = make_checkpoint(tmp_path / "other", seed=99)
    done = run("--tuned", family.tuned, "--base", other, "--output", tmp_path / "v")
    assert "does not look tuned from the base: another pretrained" in done.stderr
    done = run("--tuned", family.tuned, "--base", family.base, "--output", tmp_path / "w")
    assert done.stderr == ""


def test_brackets_in_a_name_are_shown(family: Family, tmp_path: Path) -> None:
    """They are no markup."""
    donors = ("--tuned", family.tuned, "--base", family.base)
    done = run(*donors, "--output", tmp_path / "v[bold]")
    assert "v[bold]" in done.stdout.replace("\n", "")
