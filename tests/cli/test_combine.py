"""vllm_rvec.cli.combine: the command around `combine`."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import typer
from typer.testing import CliRunner

from vllm_rvec.cli.combine import combine_command, parse_terms
from vllm_rvec.errors import ConfigError
from vllm_rvec.vector import VectorReader

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result

app = typer.Typer()
app.command()(combine_command)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("v:0.7", ("v", 0.7)),
        ("runs/12:30/v:-1", ("runs/12:30/v", -1.0)),
        ("team/v@main:1e-2", ("team/v@main", 0.01)),
        ("a:b:c:0", ("a:b:c", 0.0)),
    ],
)
def test_the_last_colon_parts_vector_and_weight(text: str, expected: tuple[str, float]) -> None:
    """Folders may have colons of their own."""
    assert parse_terms([text]) == [expected]


def test_all_vectors_without_a_weight_are_named() -> None:
    """With what to write instead."""
    with pytest.raises(ConfigError, match="VECTOR:WEIGHT") as caught:
        parse_terms(["v", "v:1", "v:", ":1", "v:one"])
    assert caught.value.problems == ("v", "v:", ":1", "v:one")


def test_vectors_are_added_with_their_weights(vector: Path, tmp_path: Path) -> None:
    """Also from a folder with a colon in its name; in the lineage with their weights."""
    copy = shutil.copytree(vector, tmp_path / "12:30")
    done = run(f"{vector}:0.75", f"{copy}:-0.25", "--output", tmp_path / "w", "--json")
    made = json.loads(done.stdout)
    assert made["operation"] == "combine"
    assert made["parameters"] == {"1": f"{vector.name}:0.75", "2": "12:30:-0.25"}
    assert made["norm"] == pytest.approx(made["inputs_measures"][0]["norm"] / 2, rel=1e-6)
    assert len(VectorReader(tmp_path / "w").manifest.lineage[-1].inputs) == 2


def test_the_table_names_the_inputs_norms(vector: Path, tmp_path: Path) -> None:
    """One for each vector."""
    done = run(f"{vector}:1", f"{vector}:1", "--output", tmp_path / "w", "--encoding", "dense")
    assert done.exit_code == 0, done.output
    assert "norm of the inputs" in done.stdout
