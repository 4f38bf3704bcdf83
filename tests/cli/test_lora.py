"""vllm_rvec.cli.lora: the commands around `import_lora` and `export_lora`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import typer
from typer.testing import CliRunner

from tests.support.adapters import make_adapter
from vllm_rvec.cli.lora import export_lora_command, import_lora_command
from vllm_rvec.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result

    from tests.support.checkpoints import Family

app = typer.Typer()
app.command("import-lora")(import_lora_command)
app.command("export-lora")(export_lora_command)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def adapter(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "adapter"
    return make_adapter(family.base, folder, r=4, lora_alpha=6, target_modules=["q_proj"])


def test_an_import_is_told_about(family: Family, adapter: Path, tmp_path: Path) -> None:
    """What is changed, and by how much."""
    done = run("import-lora", adapter, "--output", tmp_path / "v", "--base", family.base)
    assert done.exit_code == 0, done.output
    assert "2 of the base's 26 are changed" in done.stdout
    assert "1.5" in done.stdout


def test_an_import_in_json(adapter: Path, family: Family, tmp_path: Path) -> None:
    """One object, and nothing else on stdout."""
    output = tmp_path / "v"
    done = run("import-lora", adapter, "--output", output, "--base", family.base, "--json")
    made = json.loads(done.stdout)
    assert made["output"] == str(output)
    assert (made["complete"], made["tensors"], made["changed_tensors"]) == (True, 26, 2)
    assert (made["ranks"], made["scalings"]) == ([4], [1.5])
    assert 0 < made["relative_norm"] < 1


def test_what_is_no_adapter_is_a_checkpoint_error(family: Family, tmp_path: Path) -> None:
    """Which exits with 4; nothing is written."""
    done = run("import-lora", family.base, "--output", tmp_path / "v")
    assert isinstance(done.exception, CheckpointError)
    assert not (tmp_path / "v").exists()


def test_an_export_shows_the_energy_per_module_and_in_all(vector: Path, tmp_path: Path) -> None:
    """A row for each weight, what is left out, and the sum."""
    done = run("export-lora", vector, "--rank", 8, "--output", tmp_path / "adapter")
    assert done.exit_code == 0, done.output
    for expected in ("mlp.up_proj", "left out: norm or bias", "kept in all", "--max-lora-rank 8"):
        assert expected in done.stdout
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_an_export_in_json(vector: Path, tmp_path: Path) -> None:
    """Percent, per tensor and in all."""
    options = ("--rank", 1000, "--dtype", "bfloat16", "--base", "owner/model", "--json")
    done = run("export-lora", vector, "--output", tmp_path / "adapter", *options)
    made = json.loads(done.stdout)
    assert (made["base"], made["rank"], made["max_lora_rank"]) == ("owner/model", 64, 64)
    assert 99 < made["kept_percent_of_linear"] < 100
    left_out = sum(made["left_out_percent"].values())
    assert 0 < made["kept_percent"] < 100 - left_out
    assert len(made["tensors"]) == 26
