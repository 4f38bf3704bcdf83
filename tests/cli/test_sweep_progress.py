"""vllm_rvec.cli.sweep_progress: how far a sweep is."""

from __future__ import annotations

import io

from rich.console import Console

from vllm_rvec.cli.sweep_progress import LINE_SECONDS, SweepProgress
from vllm_rvec.evaluation.records import Answer, Arm, ArmKind, Grade

ARMS = (Arm("base", ArmKind.BASE, 0.0, "base"), Arm("v@1", ArmKind.VECTOR, 1.0, "base", 1.0))


def answer(arm: str, *, is_correct: bool) -> Answer:
    grade = Grade(is_correct, "x")
    return Answer(arm, "t", "1", "", "choose", "", "stop", 3, 10, 0.1, grade)


def test_rate_and_time_left_are_of_this_run() -> None:
    """Answers of earlier ones count as done, and say nothing of the speed."""
    now = 0.0
    out = io.StringIO()
    progress = SweepProgress(
        Console(file=out), ARMS, 100, [answer("base", is_correct=True)] * 50, clock=lambda: now
    )
    with progress:
        assert progress.line() == "50 of 100 answers"
        now = LINE_SECONDS - 1
        progress.take(answer("v@1", is_correct=True))
        assert not out.getvalue()
        now = LINE_SECONDS + 10
        progress.take(answer("v@1", is_correct=False))
    assert out.getvalue() == "52 of 100 answers, 0.1/s, 0 tokens/s, 16 min left\n"


def test_a_terminal_shows_each_arms_share() -> None:
    """As it is so far."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    with SweepProgress(console, ARMS, 3) as progress:
        progress.take(answer("base", is_correct=True))
        progress.take(answer("base", is_correct=False))
    assert "50.0%" in out.getvalue()
    assert "2 of 3 answers" in out.getvalue()
