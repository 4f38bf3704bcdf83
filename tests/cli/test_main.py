"""vllm_rvec.cli.main: exit statuses and how errors look."""

from __future__ import annotations

import io
import sys

import pytest
import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from vllm_rvec import errors
from vllm_rvec.cli.main import (
    COMMANDS,
    EXIT_CODES,
    EXIT_HELP,
    app,
    exit_code,
    run,
    show_error,
)
from vllm_rvec.cli.serve import serve_command
from vllm_rvec.errors import EngineStartupError, RvecError


def test_every_exit_status_is_documented() -> None:
    """`--help` names each."""
    assert all(f" {code} " in EXIT_HELP for code in EXIT_CODES.values())
    assert len(set(EXIT_CODES.values())) == len(EXIT_CODES)


@pytest.mark.parametrize(
    "name", sorted(n for n in errors.__all__ if n.endswith("Error") and n != "RvecError")
)
def test_a_kind_of_error_that_a_user_can_cause_has_its_status(name: str) -> None:
    """Only errors that never end a command fall back to 1."""
    kind = getattr(errors, name)
    if name == "UpstreamError" or name.startswith("AlphaChange"):
        assert exit_code(kind("x")) == 1
    else:
        assert exit_code(kind("x")) > 2


def test_an_engines_last_lines_come_before_the_error() -> None:
    """As text: brackets of an engine's output are no markup."""
    out = io.StringIO()
    lines = [f"line {n} [bold]" for n in range(50)]
    error = EngineStartupError("ended", why="no memory", last_lines=lines, exit_status=1)
    show_error(error, Console(file=out, width=100))
    text = out.getvalue()
    assert "line 49 [bold]" in text
    assert "line 3 " not in text
    assert text.rstrip().endswith("error: ended\n  why: no memory")


def test_the_root_error_falls_back_to_one() -> None:
    """1 is for what nobody foresaw."""
    assert exit_code(RvecError("x")) == 1


@pytest.mark.parametrize("name", sorted({**COMMANDS, "serve": serve_command}))
def test_help_shows_brackets(name: str) -> None:
    """Rich takes [@revision] for markup and swallows it, unless it is escaped."""
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    for parameter in command.commands[name].params:
        text = getattr(parameter, "help", None) or ""
        assert Text.from_markup(text).plain == text.replace("\\[", "["), parameter.name


def test_wherever_a_vector_or_checkpoint_is_named_help_says_what_will_do() -> None:
    """A Hub id with its revision, and for vectors a URL, in the same words."""
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    texts = {
        (name, parameter.name): getattr(parameter, "help", None) or ""
        for name in COMMANDS
        for parameter in command.commands[name].params
        if parameter.name in {"vector", "vectors", "target", "tuned", "adapter"}
    }
    forms = {
        name: "older, Hub id\\[@revision] or URL" if is_vector else "older or Hub id\\[@revision]"
        for name, is_vector in ((key[1], str(key[1]).startswith("vector")) for key in texts)
    }
    assert [key for key, text in texts.items() if forms[key[1]] not in text] == []


def test_ctrl_c_is_said_and_exits_with_130(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the shells' convention."""
    interrupted = typer.Typer()

    @interrupted.command()
    def command() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["vllm-rvec"])
    monkeypatch.setattr("vllm_rvec.cli.main.app", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 130
    assert capfd.readouterr() == ("", "interrupted\n")
