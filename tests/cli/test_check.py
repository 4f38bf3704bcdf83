"""vllm_rvec.cli.check: the report on stdout, the verdict in the exit status."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import typer
from typer.testing import CliRunner

from tests.support.checkpoints import make_checkpoint
from tests.support.variations import edited_vector, resized, write_tokenizer
from vllm_rvec.cli.check import REFUSED_STATUS, check_command
from vllm_rvec.cli.main import EXIT_CODES
from vllm_rvec.errors import (
    CheckpointNotFoundError,
    ConfigError,
    IncompatibleVectorError,
    RvecError,
    VectorNotFoundError,
)
from vllm_rvec.vector.compatibility.tokenizer import fingerprint

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family


def check(vector: Path, target: Path, *options: str) -> tuple[int, str]:
    """Run the command; return its exit status and what it printed on stdout."""
    app = typer.Typer()
    app.command()(check_command)
    arguments = [str(vector), "--target", str(target), *options]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def test_a_target_of_the_family_exits_with_0(family: Family, vector: Path) -> None:
    """A row for each level, with both numbers of the lineage; a warning is no failure."""
    code, text = check(vector, family.target)
    assert code == 0
    assert f"{family.target}: warn" in text
    for part in ("structure", "tokenizer", "lineage", "tokens are not compared", "correlation 0.9"):
        assert part in text


def test_a_stranger_exits_with_7(vector: Path, tmp_path: Path) -> None:
    """As every command that refuses a vector."""
    stranger = make_checkpoint(tmp_path / "stranger", seed=5, layers=3)
    code, text = check(vector, stranger)
    assert code == REFUSED_STATUS == EXIT_CODES[IncompatibleVectorError]
    assert "refuse" in text
    assert "another pretrained initialisation: relative distance to the base donor 1." in text
    assert "... and 4 more" in text  # of twelve tensors


def test_json_is_one_object_with_all_evidence(vector: Path, tmp_path: Path) -> None:
    """For machines, with the same exit status."""
    stranger = make_checkpoint(tmp_path / "stranger", seed=5, layers=3)
    code, text = check(vector, stranger, "--json")
    assert code == REFUSED_STATUS
    found = json.loads(text)
    assert found["verdict"] == "refuse"
    structure, tokenizer, lineage = found["levels"]
    assert (structure["name"], structure["mismatched_tensors"]) == ("structure", 12)
    assert len([f for f in structure["findings"] if f["verdict"] == "refuse"]) == 12
    assert (tokenizer["name"], tokenizer["verdict"]) == ("tokenizer", "warn")
    assert lineage["distance"] > 1
    assert lineage["correlation"] < 0.5


def test_the_policy_decides_on_other_rows(family: Family, vector: Path, tmp_path: Path) -> None:
    """Strict refuses, common goes on and says which rows get nothing."""
    target = resized(family.target, tmp_path / "t", 576)
    assert check(vector, target)[0] == REFUSED_STATUS
    code, text = check(vector, target, "--vocab", "common")
    assert code == 0
    assert "nothing is added to rows 512 to 575" in text


def test_tokens_are_shown_as_text(family: Family, vector: Path, tmp_path: Path) -> None:
    """Neither markup nor control characters of a target's tokens reach the terminal."""
    write_tokenizer(tmp_path, ["a", "b"])
    tokens = fingerprint(tmp_path)
    target = resized(family.target, tmp_path / "t", 512)
    write_tokenizer(target, ["a", "[bold red]\x1b[2J"])
    known = edited_vector(vector, tmp_path / "v", tokenizer=tokens)
    code, text = check(known, target)
    assert code == 0
    assert r"id 1: '[bold red]\x1b[2J' in the target" in text


@pytest.mark.parametrize(
    ("vector_name", "target_name", "vocab", "error"),
    [
        ("none", "", "strict", VectorNotFoundError),
        ("", "none", "strict", CheckpointNotFoundError),
        ("", "", "some", ConfigError),
    ],
)
def test_what_can_not_be_checked_is_an_error(  # noqa: PLR0917 - one case each
    family: Family,
    vector: Path,
    vector_name: str,
    target_name: str,
    vocab: str,
    error: type[RvecError],
) -> None:
    """No report: the exit status is that of the error."""
    with pytest.raises(error):
        check(vector / vector_name, family.target / target_name, "--vocab", vocab)


def test_every_vector_of_a_recipe_is_checked_where_it_is_added(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """A target with another vocabulary is refused by the whole vector only."""
    target = resized(family.target, tmp_path / "target", 576)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"vectors: [{{path: {vector}, layers: 0-1}}, {{path: {vector}}}]\n")
    code, text = check_recipe(recipe, target)
    first, second = json.loads(text)["vectors"]
    assert code == REFUSED_STATUS
    assert (first["verdict"], second["verdict"]) == ("warn", "refuse")
    recipe.write_text(f"vocabulary: common\nvectors: [{{path: {vector}}}]\n")
    assert check_recipe(recipe, target)[0] == 0
    assert check_recipe(recipe, target, "--vocab", "strict")[0] == REFUSED_STATUS


def check_recipe(recipe: Path, target: Path, *options: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(check_command)
    arguments = ["--recipe", str(recipe), "--target", str(target), "--json", *options]
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, done.stdout
