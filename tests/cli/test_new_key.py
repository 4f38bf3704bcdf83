"""vllm_rvec.cli.new_key: a key for a client, and the lines that let it in."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import typer
import yaml
from typer.testing import CliRunner

from vllm_rvec.cli.new_key import new_key_command
from vllm_rvec.router.keyring import KeyConfig, hash_key

if TYPE_CHECKING:
    from typer.testing import Result


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(new_key_command)
    return CliRunner().invoke(app, [*arguments])


def test_the_key_alone_is_on_stdout() -> None:
    """So that it can be piped into a secret store; the rest is on stderr, without the key."""
    done = run()
    assert done.exit_code == 0
    (key,) = done.stdout.splitlines()
    assert key.startswith("rvec-")
    assert key not in done.stderr
    lines = done.stderr.split("configuration:\n")[1]
    assert lines == f"keys:\n  team-a: {{sha256: {hash_key(key)}}}\n"


@pytest.mark.parametrize("name", ["team-b", "no", "1", "a:b", "x" * 200, "~"])
def test_the_lines_can_be_pasted_for_any_name(name: str) -> None:
    """YAML reads them as they were meant, and the settings take them."""
    done = run("--name", name)
    key = done.stdout.strip()
    read = yaml.safe_load(done.stderr.split("configuration:\n")[1])
    assert read == {"keys": {name: {"sha256": hash_key(key)}}}
    assert KeyConfig.model_validate(read["keys"][name]).sha256 == hash_key(key)


def test_json_is_for_machines() -> None:
    """One object with the key, its hash and the lines; nothing on stderr."""
    done = run("--json", "--name", "ci")
    made = json.loads(done.stdout)
    assert done.stderr == ""
    assert made == {
        "name": "ci",
        "key": made["key"],
        "sha256": hash_key(made["key"]),
        "config": f"keys:\n  ci: {{sha256: {made['sha256']}}}\n",
    }


def test_each_call_makes_another_key() -> None:
    """Nothing is remembered."""
    assert run().stdout != run().stdout


@pytest.mark.parametrize("name", ["", " ", "two words", "Zoë", "a,b"])
def test_what_is_no_name_is_refused(name: str) -> None:
    """With Typer's usage error, before a key is made."""
    done = run("--name", name)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "a name is printable ASCII text" in done.stderr


def test_the_command_is_known_without_loading_the_router() -> None:
    """`--help` starts fast: no aiohttp, no pydantic, no torch."""
    code = (
        "import sys, vllm_rvec.cli.new_key\n"
        "print(sorted({'aiohttp', 'pydantic', 'torch', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
