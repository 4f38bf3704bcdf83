"""vllm_rvec.errors: one message, all facts."""

from __future__ import annotations

import pickle
from pathlib import Path

from vllm_rvec.errors import EngineStartupError, VectorNotFoundError


def test_a_message_says_what_why_and_what_to_do() -> None:
    """The three parts stand in this order, a line each."""
    error = VectorNotFoundError("no vector", why="no such path", fix="make one")
    assert str(error) == "no vector\n  why: no such path\n  do:  make one"


def test_a_long_list_is_cut_in_the_message_only() -> None:
    """The message counts what it hides; the attribute holds all."""
    error = VectorNotFoundError("bad", problems=[f"p{n}" for n in range(20)])
    assert "... and 12 more" in str(error)
    assert len(error.problems) == 20


def test_errors_keep_their_facts_between_processes() -> None:
    """An engine sends exceptions from one of its processes to another."""
    error = EngineStartupError("ended", why="bad flag", last_lines=["a", "b"], exit_status=2)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert str(copy) == str(error)
    assert (copy.last_lines, copy.exit_status) == (("a", "b"), 2)
    missing = VectorNotFoundError("x", path=Path("/nowhere"), tensor_name="t")
    assert pickle.loads(pickle.dumps(missing)).path == Path("/nowhere")  # noqa: S301
