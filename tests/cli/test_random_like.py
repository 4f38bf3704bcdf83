"""vllm_rvec.cli.random_like: the command around `random_like`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import typer
from typer.testing import CliRunner

from vllm_rvec.cli.random_like import random_like_command

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result

app = typer.Typer()
app.command()(random_like_command)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(("flags", "kind"), [((), "gaussian"), (("--permute",), "permutation")])
def test_both_kinds_of_control_have_the_norm(
    vector: Path, tmp_path: Path, flags: tuple[str, ...], kind: str
) -> None:
    """The kind and the seed are in the result and in its lineage."""
    done = run(vector, "--seed", "7", "--output", tmp_path / "w", *flags, "--json")
    made = json.loads(done.stdout)
    assert made["parameters"] == {"kind": kind, "seed": "7"}
    assert made["norm"] == pytest.approx(made["inputs_measures"][0]["norm"], rel=1e-5)


def test_a_seed_has_to_be_given(vector: Path, tmp_path: Path) -> None:
    """A control that can't be made again is none."""
    done = run(vector, "--output", tmp_path / "w")
    assert done.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_table_is_for_people(vector: Path, tmp_path: Path) -> None:
    """What was drawn, and how large it is."""
    done = run(vector, "--seed", "7", "--output", tmp_path / "w")
    assert "random-like (kind gaussian, seed 7)" in done.stdout
