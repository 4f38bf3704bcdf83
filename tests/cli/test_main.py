"""vllm_rvec.cli.main: exit statuses and how errors look."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from vllm_rvec import errors
from vllm_rvec.cli.main import EXIT_CODES, EXIT_HELP, exit_code, show_error
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
    if name == "UpstreamError":
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
