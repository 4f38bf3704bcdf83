"""vllm_rvec.cli.locating: every command that takes a vector takes its URL."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from tests.support.web import Web, run_web
from vllm_rvec.cli.main import app

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.checkpoints import Family


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A server, and an empty cache of a user who is online."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with run_web() as found:
        yield found


@pytest.mark.parametrize(
    "command",
    [
        "verify URL",
        "inspect URL --no-spectrum",
        "check URL --target TARGET",
        "merge --target TARGET --vector URL --output OUT",
        "transform URL --density 0.5 --output OUT",
        "combine URL:0.5 URL:1 --output OUT",
        "random-like URL --seed 1 --output OUT",
        "export-lora URL --rank 2 --output OUT",
    ],
)
def test_a_url_will_do(
    web: Web, family: Family, vector: Path, tmp_path: Path, command: str
) -> None:
    """It is fetched by the first that asks, and never shown with its password."""
    url = web.add_folder("/v", vector).replace("//", "//me:sesame-7@")
    words = {"URL": url, "TARGET": str(family.target), "OUT": str(tmp_path / "out")}
    arguments = [
        words.get(word, word.replace("URL", url) if word.startswith("URL:") else word)
        for word in command.split()
    ]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 0, (done.output, done.exception)
    assert len(web.asked("vector.safetensors")) == 1
    assert "sesame" not in done.output
    for written in (tmp_path / "out").glob("*"):
        assert b"sesame" not in written.read_bytes(), written
