"""vllm_rvec.cli.merge: the command around `merge`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

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
