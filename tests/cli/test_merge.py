"""vllm_rvec.cli.merge: the command around `merge`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.checkpoints import make_checkpoint, tensors

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_rvec", "merge", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_checkpoint_is_made_and_told_about(family: Family, vector: Path, tmp_path: Path) -> None:
    """The table is on stdout; the weights are not the target's."""
    out = tmp_path / "out"
    done = run("--target", family.target, "--vector", vector, "--output", out)
    assert done.returncode == 0, done.stderr
    assert "26 (26 changed)" in done.stdout
    assert "config.json" in done.stdout
    name = "model.norm.weight"
    assert not tensors(out)[name].equal(tensors(family.target)[name])


def test_json_is_for_machines(
    family: Family, vector: Path, vector_bf16: Path, tmp_path: Path
) -> None:
    """One object, and nothing else on stdout; vectors and alphas in their order, signs and all."""
    out = tmp_path / "out"
    vectors = ("--vector", vector, "--alpha", -0.5, "--vector", vector_bf16, "--alpha", 2)
    done = run("--target", family.target, *vectors, "--output", out, "--json")
    made = json.loads(done.stdout)
    assert made["output"] == str(out)
    assert [(v["id"], v["alpha"]) for v in made["vectors"]] == [("float32", -0.5), ("bfloat16", 2)]
    assert made["size_bytes"] == (out / "model.safetensors").stat().st_size
    assert made["tensors"] == made["changed_tensors"] == 26
    assert made["changed_weights"] == sum(t.numel() for t in tensors(out).values())
    assert "config.json" in made["carried"]


def test_numbers_that_do_not_agree_exit_with_3(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """Two vectors, one alpha: nothing is written."""
    vectors = ("--vector", vector, "--vector", vector, "--alpha", 1)
    done = run("--target", family.target, *vectors, "--output", tmp_path / "out")
    assert done.returncode == 3
    assert "2 vectors and 1 alphas" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_does_not_fit_exits_with_7_unless_forced(
    vector: Path, tmp_path: Path
) -> None:
    """The error says what does not match; --force goes on and says so, too."""
    target = make_checkpoint(tmp_path / "deeper", seed=0, layers=3)
    arguments = ("--target", target, "--vector", vector, "--output", tmp_path / "out")
    refused = run(*arguments)
    assert refused.returncode == 7
    assert "model.layers.2." in refused.stderr
    forced = run(*arguments, "--force")
    assert forced.returncode == 0, forced.stderr
    assert "model.layers.2." in forced.stderr
    assert "38 (26 changed)" in forced.stdout


def test_serves_file_is_merged_too(
    family: Family, vector: Path, vector_bf16: Path, tmp_path: Path
) -> None:
    """Its vectors from beside it, its vocabulary; the rest is for engines. One alpha over all."""
    (tmp_path / "one").symlink_to(vector)
    (tmp_path / "serve.yaml").write_text(
        "model: somewhere\nport: 1\nengine: {max-model-len: 64}\nvectors:\n"
        "  - {path: one, alpha: {mlp: 0.5, default: 0}}\n"
        f"  - {{path: {vector_bf16}, layers: 1}}\n"
    )
    out = tmp_path / "out"
    arguments = ("--target", family.target, "--recipe", tmp_path / "serve.yaml", "--output", out)
    done = run(*arguments, "--alpha", -2, "--json")
    assert done.returncode == 0, done.stderr
    found = [(v["alpha"], v["recipe"]) for v in json.loads(done.stdout)["vectors"]]
    assert found == [(-2, {"alpha": {"mlp": 0.5, "default": 0}}), (-2, {"layers": "1"})]
    name = "model.layers.0.mlp.up_proj.weight"
    expected = tensors(family.target)[name].float() - tensors(vector)[name]
    assert tensors(out)[name].equal(expected.bfloat16())
    twice = run(*arguments, "--alpha", 1, "--alpha", 1)
    assert twice.returncode == 3
    assert "a recipe and 2 alphas" in twice.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "no vector is given"),
        (("--vector", "v", "--recipe", "r.yaml"), "vectors and a recipe are both given"),
        (("--recipe", "r.yaml"), "r.yaml can't be read"),
    ],
    ids=str,
)
def test_vectors_or_a_recipe(arguments: tuple[str, ...], problem: str, tmp_path: Path) -> None:
    """One of them, and one that is there."""
    done = run("--target", tmp_path, "--output", tmp_path / "out", *arguments)
    assert done.returncode == 3
    assert problem in done.stderr
