"""The README is true: its flags, settings, exit statuses, files and make targets exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_rvec.cli.main import COMMANDS, EXIT_CODES
from vllm_rvec.evaluation.config import SweepConfig
from vllm_rvec.loader.config import LoaderConfig
from vllm_rvec.loader.formats import VLLM_KEYS
from vllm_rvec.serve import ServeConfig, load_config
from vllm_rvec.vector.recipe import RecipeVector

ROOT = Path(__file__).resolve().parents[1]
MINIATURE = ROOT / "examples" / "reasoning_in_miniature"
README = (ROOT / "README.md").read_text()
COMMANDS_README = (ROOT / "vllm_rvec" / "vector" / "README.md").read_text()
ROUTER_README = (ROOT / "vllm_rvec" / "router" / "README.md").read_text()
EVALUATION_README = (ROOT / "vllm_rvec" / "evaluation" / "README.md").read_text()
ROUTER_COMMANDS = {"route", "check-config", "new-key", "results"}
HOMES = {
    "serve": README,
    "sweep": EVALUATION_README,
    **dict.fromkeys(ROUTER_COMMANDS, ROUTER_README),
}
"""Where commands are explained that are not the vector's."""
DOCUMENTS = [
    ROOT / "vllm_rvec" / "router" / "README.md",
    ROOT / "vllm_rvec" / "evaluation" / "README.md",
    ROOT / "README.md",
    ROOT / "vllm_rvec" / "vector" / "README.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "vllm_rvec" / "vector" / "FORMAT.md",
    ROOT / "vllm_rvec" / "loader" / "README.md",
    ROOT / "vllm_rvec" / "loader" / "FAMILIES.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / ".github" / "CONTRIBUTING.md",
    MINIATURE / "README.md",
    MINIATURE / "target" / "README.md",
    *sorted((ROOT / "deploy").rglob("README.md")),
]


def help_flags(command: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-m", "vllm_rvec", command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "200", "NO_COLOR": "1"},
    )
    found = set(re.findall(r"--[a-z][a-z-]+", done.stdout)) - {"--help"}
    return {flag for flag in found if flag.replace("--no-", "--") not in found - {flag}}


def section(text: str, command: str) -> str:
    """Return the part of a document whose heading names a command."""
    parts = re.split(r"^## ", text, flags=re.MULTILINE)
    (found,) = [p for p in parts if command in re.split(r"[,\s]+", p.partition("\n")[0].lower())]
    return found


@pytest.mark.parametrize("command", ["serve", *COMMANDS])
def test_every_flag_is_documented(command: str) -> None:
    """What `--help` offers, the command's own section explains."""
    text = section(HOMES.get(command, COMMANDS_README), command)
    assert not {flag for flag in help_flags(command) if flag not in text}


def test_every_command_is_in_the_readme() -> None:
    """By name."""
    assert not {command for command in COMMANDS if f"`{command}`" not in README}


def test_every_setting_is_documented() -> None:
    """Each name that the YAML file may hold."""
    names = [field.alias or name for name, field in ServeConfig.model_fields.items()]
    assert all(f"`{name}`" in README for name in names)


def test_every_setting_of_a_sweep_is_documented() -> None:
    """Each name that its YAML file may hold."""
    names = [field.alias or name for name, field in SweepConfig.model_fields.items()]
    assert [name for name in names if f"`{name}`" not in EVALUATION_README] == []


def test_every_loader_key_is_documented() -> None:
    """Each key of --model-loader-extra-config."""
    text = (ROOT / "vllm_rvec" / "loader" / "README.md").read_text()
    keys = (*LoaderConfig.model_fields, *RecipeVector.model_fields, *VLLM_KEYS)
    assert all(f"`{key}`" in text for key in keys)


def test_every_code_of_the_routers_errors_is_documented() -> None:
    """In the table of its README."""
    source = " ".join(file.read_text() for file in (ROOT / "vllm_rvec" / "router").rglob("*.py"))
    codes = set(re.findall(r'\bcode(?:: ClassVar\[str\])? ?= ?"(\w+)"', source))
    assert {"request_timeout", "model_busy"} <= codes
    assert {code for code in codes if f"`{code}`" not in section(ROUTER_README, "errors")} == set()


def test_every_exit_status_is_documented() -> None:
    """A row each."""
    assert all(f"\n| {code} | " in README for code in (0, 1, 2, *EXIT_CODES.values()))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document: Path) -> None:
    """Relative links only; the web is not asked."""
    text = document.read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    local = [link for link in links if "://" not in link]
    missing = [link for link in local if not (document.parent / link).exists()]
    assert not missing


def test_make_targets_exist() -> None:
    """Every `make x` in the documents."""
    makefile = (ROOT / "Makefile").read_text()
    for document in DOCUMENTS:
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_demo_configuration_is_valid() -> None:
    """And its files are there, found from any folder."""
    config = load_config(MINIATURE / "serve.yaml", {})
    assert Path(config.model, "config.json").is_file()
    assert Path(config.recipe[0].path, "vector.json").is_file()
    assert list(config.variants) == ["base", "enhanced@1"]


def test_the_demo_table_is_what_was_measured() -> None:
    """The README's table is the one that `make demo-sweep` wrote."""
    assert (MINIATURE / "served.md").read_text() in README


def test_the_demo_is_small() -> None:
    """Under 10 MB for all files together."""
    files = [p for p in MINIATURE.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files if "cache" not in str(p)) < 10_000_000
