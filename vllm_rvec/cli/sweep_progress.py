"""What a person sees on stderr while a sweep asks: how far it is, how fast, how each arm does."""

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vllm_rvec.cli.printable import printable
from vllm_rvec.evaluation.records import Answer, Arm

__all__ = ["SweepProgress", "span_text"]

LINE_SECONDS = 30.0
"""How often a log gets a line."""


class SweepProgress:
    """Counts answers, and shows them: live on a terminal, else a line every half minute.

    Use it as `with progress` while questions are asked; again, where an engine needs time between.

    Args:
        console: Where to show.
        arms: In which order arms are shown.
        total: How many answers there will be, with those of earlier runs.
        known: Answers of earlier runs.
        clock: Seconds that only grow; a seam for tests.
    """

    def __init__(
        self,
        console: Console,
        arms: Sequence[Arm],
        total: int,
        known: Sequence[Answer] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._total = total
        self._counts = {arm.name: [0, 0] for arm in arms}
        self._clock = clock
        self._entered_at = self._last_line_at = clock()
        self._earlier_seconds = 0.0
        self._new = self._new_tokens = 0
        for answer in known:
            self._count(answer)
        self._live = Live(get_renderable=self._shown, console=console, refresh_per_second=2)

    def __enter__(self) -> Self:
        self._entered_at = self._last_line_at = self._clock()
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()
        self._earlier_seconds += self._clock() - self._entered_at
        self._entered_at = self._clock()

    def take(self, answer: Answer) -> None:
        """Count a new answer."""
        self._count(answer)
        self._new += 1
        self._new_tokens += answer.completion_tokens
        now = self._clock()
        if not self._console.is_terminal and now - self._last_line_at >= LINE_SECONDS:
            self._last_line_at = now
            self._console.print(self.line(), markup=False, highlight=False, soft_wrap=True)

    def line(self) -> str:
        """How far it is, in one line."""
        done = sum(asked for asked, _ in self._counts.values())
        seconds = max(self._earlier_seconds + self._clock() - self._entered_at, 1e-9)
        rate = self._new / seconds
        parts = [f"{done:,} of {self._total:,} answers"]
        if self._new:
            parts.append(f"{rate:.1f}/s, {self._new_tokens / seconds:,.0f} tokens/s")
            parts.append(f"{span_text((self._total - done) / rate)} left")
        return ", ".join(parts)

    def _count(self, answer: Answer) -> None:
        count = self._counts.setdefault(answer.arm, [0, 0])
        count[0] += 1
        count[1] += answer.is_correct

    def _shown(self) -> Group:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("arm")
        table.add_column("answers", justify="right")
        table.add_column("correct", justify="right")
        for name, (asked, right) in self._counts.items():
            share = f"{right / asked:.1%}" if asked else "-"
            table.add_row(Text(printable(name)), f"{asked:,}", share)
        return Group(table, Text(self.line(), "bold"))


def span_text(seconds: float) -> str:
    """Write a span of time as people say it.

    >>> span_text(42), span_text(200), span_text(9000)
    ('42 s', '3 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
