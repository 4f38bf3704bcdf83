"""vllm_rvec.cli.progress: what a log gets in place of a bar."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm_rvec.cli import progress
from vllm_rvec.cli.progress import show_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest


def test_short_work_leaves_no_line_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    """Not even an empty one."""
    with show_progress("merging") as on_progress:
        on_progress(1, 2)
    assert capsys.readouterr() == ("", "")


def test_long_work_is_told_to_a_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line for each period, on stderr; work of no size is no division by zero."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with show_progress("[merging]") as on_progress:
        on_progress(0, 0)
        on_progress(1, 2)
    assert capsys.readouterr() == ("", "[merging]: 0%\n[merging]: 50%\n")


def test_nothing_is_shown_of_what_is_fast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second after the first report, and not before, somebody wants to know."""
    opened: list[str] = []

    @contextmanager
    def note(what: str) -> Iterator[Callable[[int, int], None]]:
        opened.append(what)
        yield lambda done, total: opened.append(f"{done}/{total}")

    monkeypatch.setattr(progress, "show_progress", note)
    with progress.show_when_slow("fetching") as on_progress:
        on_progress(1, 3)
        on_progress(2, 3)
        assert not opened
        monkeypatch.setattr(progress, "SLOW_SECONDS", -1.0)
        on_progress(3, 3)
    assert opened == ["fetching", "3/3"]
