"""vllm_rvec.cli.push: the command around `push`, pointed at a Hub by environment alone."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.hub import TOKEN, StandInHub, run_hub, use_hub
from vllm_rvec.vector.fetching import locate_vector

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """An empty stand-in, and a user who is logged in."""
    with run_hub() as found:
        use_hub(found, tmp_path / "hf", monkeypatch, TOKEN)
        yield found


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_rvec", "push", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_vector_is_pushed_and_its_use_told(hub: StandInHub, vector: Path) -> None:
    """The page and the commands are on stdout, unbroken; no bars and no token anywhere."""
    done = run(vector, "owner/vector")
    assert done.returncode == 0, done.stderr
    commit = hub.repositories["owner/vector"].refs["main"]
    assert f"{hub.endpoint}/owner/vector" in done.stdout
    assert f"--vector owner/vector@{commit}" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    assert done.stderr.strip() == ""
    assert locate_vector("owner/vector").revision == commit


def test_json_is_for_machines(hub: StandInHub, vector: Path) -> None:
    """One object, and nothing else on stdout."""
    options = ("--private", "--revision", "v1", "--message", "first", "--json")
    made = json.loads(run(vector, "owner/vector", *options).stdout)
    repository = hub.repositories["owner/vector"]
    assert made == {
        "vector": str(vector),
        "repo": "owner/vector",
        "url": f"{hub.endpoint}/owner/vector/tree/v1",
        "commit": repository.refs["v1"],
        "size_bytes": (vector / "vector.safetensors").stat().st_size,
    }
    assert repository.is_private
    assert repository.commits[made["commit"]].message == "first"


def test_a_refusal_exits_with_3_and_shows_no_token(
    hub: StandInHub, vector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the server wrote it into its answer."""
    secret = "some-wrong-secret"
    monkeypatch.setenv("HF_TOKEN", secret)
    done = run(vector, "owner/vector")
    assert done.returncode == 3
    assert "did not accept the token" in done.stderr
    assert secret not in done.stdout + done.stderr


def test_what_is_no_vector_exits_with_5(hub: StandInHub, tmp_path: Path) -> None:
    """Nothing is asked of the Hub."""
    assert run(tmp_path / "none", "owner/vector").returncode == 5
    assert not hub.requests
