"""A progress bar on stderr, for what takes longer than two seconds; lines where it is a log."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

__all__ = ["show_progress", "show_when_slow"]

SLOW_SECONDS = 1.0

LINE_SECONDS = 30.0
"""How often a log gets a line."""


@contextmanager
def show_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the block runs; it is gone afterwards.

    Where stderr is no terminal, a line every half minute, and nothing of what is done sooner.

    Args:
        what: What is being done.

    Yields:
        A function that takes what is done and what there is in all, in any one unit.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(what, console)
        return
    columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def show_when_slow(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar once there has been something to report for a second."""
    with ExitStack() as stack:
        first = math.inf
        update: Callable[[int, int], None] | None = None

        def on_progress(done: int, total: int) -> None:
            nonlocal first, update
            first = min(first, time.monotonic())
            if update is None and time.monotonic() - first > SLOW_SECONDS:
                update = stack.enter_context(show_progress(what))
            if update is not None:
                update(done, total)

        yield on_progress


def _lines(what: str, console: Console) -> Callable[[int, int], None]:
    last = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            console.print(f"{what}: {done / (total or 1):.0%}", markup=False, highlight=False)

    return on_progress
