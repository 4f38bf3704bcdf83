"""What a person sees on stderr while engines start and run.

On a terminal: a live line for each engine that starts, with the engines' errors printed above.
Elsewhere (a file, a container's log): every line as it comes, one for each event. An engine that
is being stopped complains of it; those lines are not shown. All text from engines is stripped of
control sequences and never read as markup.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vllm_rvec.serve.engine_log import clean, phase, severity
from vllm_rvec.serve.supervisor import EngineState

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from vllm_rvec.serve.engine import EngineProcess
    from vllm_rvec.serve.plan import EngineSpec

__all__ = ["EngineConsole"]

_STATE_STYLES = {
    EngineState.STARTING: "yellow",
    EngineState.READY: "green",
    EngineState.DOWN: "red",
    EngineState.STOPPING: "dim",
    EngineState.STOPPED: "dim",
}
_ENDING = {EngineState.STOPPING, EngineState.STOPPED}
_LINE_STYLES = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}
_SHOWN_LEVELS = ("ERROR", "CRITICAL")
"""What a terminal shows of engines' lines: each start of vLLM warns of many harmless things."""


@dataclass(slots=True)
class _Row:
    alphas: str
    state: EngineState
    phase: str
    since: float
    took_seconds: float | None = None


class EngineConsole:
    """Shows the engines' states and lines.

    Inside `with`, on a terminal, the states are a live display: meant for the start-up. Its
    `on_line` and `on_state` are what `EngineProcess` and `Supervisor` call.

    Args:
        console: Where to show; stderr when None.
        verbose: Show all of the engines' lines on a terminal too.
        clock: Seconds that only grow; a seam for tests.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        verbose: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(stderr=True)
        self._verbose = verbose or not self._console.is_terminal
        self._clock = clock
        self._rows: dict[str, _Row] = {}
        self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=4)

    def __enter__(self) -> Self:
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

    def on_line(self, engine_name: str, line: str) -> None:
        """Take a line that an engine printed.

        Args:
            engine_name: The engine.
            line: The line; not trusted.
        """
        row = self._rows.get(engine_name)
        if row and row.state is EngineState.STARTING and (found := phase(line)):
            row.phase = found
        level = severity(line) or ""
        if row and row.state in _ENDING:
            return
        if self._verbose or level in _SHOWN_LEVELS:
            style = _LINE_STYLES.get(level, "") if self._console.is_terminal else ""
            self._print(engine_name, Text(clean(line), style=style))

    def on_state(
        self,
        spec: EngineSpec,
        state: EngineState,
        detail: str,
        engine: EngineProcess | None,
    ) -> None:
        """Take an engine's new state.

        Args:
            spec: The engine.
            state: Its state.
            detail: Words for people; may hold the engine's own, so not trusted.
            engine: Its process; not shown.
        """
        del engine
        row = self._note(spec, state)
        if self._live.is_started and state in {EngineState.STARTING, EngineState.READY}:
            return
        took = f" after {row.took_seconds:.0f} s" if row.took_seconds is not None else ""
        about = f" (alpha {row.alphas})" if state is EngineState.STARTING else ""
        words = f"{state}{about}{took}" + (f": {clean(detail)}" if detail else "")
        self._print(spec.name, Text(words, style=_STATE_STYLES[state]))

    def _note(self, spec: EngineSpec, state: EngineState) -> _Row:
        now = self._clock()
        row = self._rows.get(spec.name)
        if row is None or state is EngineState.STARTING:
            alphas = ", ".join(variant.alpha_text for variant in spec.variants)
            row = self._rows[spec.name] = _Row(alphas, state, state, now)
        row.state, row.phase = state, state
        row.took_seconds = now - row.since if state is EngineState.READY else None
        return row

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, row in list(self._rows.items()):
            took = row.took_seconds
            if took is None:
                took = self._clock() - row.since
            words = Text(row.phase, style=_STATE_STYLES[row.state])
            table.add_row(Text(name), Text(f"alpha {row.alphas}"), words, f"{took:.0f} s")
        return table

    def _print(self, engine_name: str, words: Text) -> None:
        line = Text.assemble((f"[{engine_name}]", "cyan"), " ", words)
        self._console.print(line, highlight=False, soft_wrap=True)
