"""vllm_rvec.cli.transform: the command around `transform`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import typer
from typer.testing import CliRunner

from vllm_rvec.cli.transform import transform_command
from vllm_rvec.errors import ConfigError, VectorNotFoundError
from vllm_rvec.vector import VectorReader

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result

app = typer.Typer()
app.command()(transform_command)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_every_option_reaches_the_lineage(vector: Path, tmp_path: Path) -> None:
    """What was asked for is what is done and recorded."""
    options = {
        "density": "0.5",
        "dare": "0.25",
        "seed": "3",
        "rescale": "norm",
        "encoding": "dense",
        "dtype": "bfloat16",
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    patterns = ("--include", "*.mlp.*", "--include", "*.self_attn.*", "--exclude", "*bias")
    done = run(vector, "--output", tmp_path / "w", *flags, *patterns)
    assert done.exit_code == 0, done.output
    (step,) = VectorReader(tmp_path / "w").manifest.lineage
    assert step.parameters == {
        **options,
        "include": "*.mlp.* *.self_attn.*",
        "exclude": "*bias",
    }


def test_a_factor_is_a_number(vector: Path, tmp_path: Path) -> None:
    """Or the word norm; nothing else."""
    done = run(vector, "--output", tmp_path / "w", "--rescale", "-0.5")
    assert done.exit_code == 0, done.output
    done = run(vector, "--output", tmp_path / "x", "--rescale", "twice")
    assert isinstance(done.exception, ConfigError)
    assert "--rescale twice" in str(done.exception)


def test_the_table_tells_before_and_after(vector: Path, tmp_path: Path) -> None:
    """On stdout, with the share of weights that is left."""
    done = run(vector, "--output", tmp_path / "w", "--density", "0.25")
    assert "transform (density 0.25)" in done.stdout
    assert "25.0" in done.stdout
    assert "norm of the input" in done.stdout


def test_brackets_in_names_are_no_markup(vector: Path, tmp_path: Path) -> None:
    """A folder called [red] is shown as it is called."""
    done = run(vector, "--output", tmp_path / "[red]", "--density", "0.25")
    assert "[red]" in done.stdout


def test_json_is_for_machines(vector: Path, tmp_path: Path) -> None:
    """One object, and nothing else on stdout."""
    done = run(vector, "--output", tmp_path / "w", "--density", "0.25", "--json")
    made = json.loads(done.stdout)
    (before,) = made["inputs_measures"]
    assert made["operation"] == "transform"
    assert made["tensors"] == before["tensors"] == 26
    assert made["changed_elements"] == pytest.approx(0.25 * made["elements"], rel=0.01)
    assert made["norm"] < before["norm"]
    assert made["size_bytes"] == (tmp_path / "w" / "vector.safetensors").stat().st_size


def test_a_vector_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """Nothing is written."""
    done = run(tmp_path / "none", "--output", tmp_path / "w", "--density", "0.5")
    assert isinstance(done.exception, VectorNotFoundError)
    assert not list(tmp_path.iterdir())
