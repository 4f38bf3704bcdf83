"""All lines in a log, what matters on a terminal, and nothing that an engine could forge."""

from __future__ import annotations

import io

from rich.console import Console

from tests.serve.conftest import stand_in_spec
from vllm_rvec.serve import EngineConsole, EngineState

ERROR = "(EngineCore pid=2) ERROR 11-23 17:13:30 [core.py:1] out of memory"
WARNING = "(APIServer pid=1) WARNING 11-23 17:13:25 [vllm.py:1703] Enforce eager set"
INFO = "(Worker pid=2) INFO 11-23 17:13:56 [cpu_model_runner.py:68] Starting to load model tiny..."
SPEC = stand_in_spec("enhanced@1")


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def plain() -> Console:
    return Console(file=io.StringIO(), width=40)


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)


def test_a_log_has_every_line_and_event() -> None:
    """Not a terminal: one line each, not wrapped, no display that moves."""
    now = 100.0
    console = plain()
    with EngineConsole(console, clock=lambda: now) as engines:
        engines.on_state(SPEC, EngineState.STARTING, "", None)
        engines.on_line(SPEC.name, INFO)
        now += 31.4
        engines.on_state(SPEC, EngineState.READY, "", None)
        engines.on_state(SPEC, EngineState.DOWN, "ended with SIGKILL", None)
        engines.on_state(SPEC, EngineState.STOPPED, "", None)
    assert shown(console).splitlines() == [
        "[enhanced@1] starting (alpha 1)",
        f"[enhanced@1] {INFO}",
        "[enhanced@1] ready after 31 s",
        "[enhanced@1] down: ended with SIGKILL",
        "[enhanced@1] stopped",
    ]


def test_a_terminal_has_errors_and_a_line_for_each_engine() -> None:
    """INFO lines only move the phase; vLLM's many warnings wait for --verbose."""
    now = 0.0
    console = terminal()
    with EngineConsole(console, clock=lambda: now) as engines:
        engines.on_state(SPEC, EngineState.STARTING, "", None)
        engines.on_line(SPEC.name, INFO)
        engines.on_line(SPEC.name, WARNING)
        engines.on_line(SPEC.name, ERROR)
        now = 12.0
        engines._live.refresh()
        assert "enhanced@1  alpha 1  loading weights  12 s" in shown(console)
        now = 31.0
        engines.on_state(SPEC, EngineState.READY, "", None)
    assert "Enforce eager set" not in shown(console)
    assert "out of memory" in shown(console)
    assert "Starting to load" not in shown(console)
    assert "enhanced@1  alpha 1  ready  31 s" in shown(console).splitlines()[-2]


def test_after_the_start_up_a_terminal_gets_lines() -> None:
    """Below a display that moves nobody else could print."""
    console = terminal()
    engines = EngineConsole(console)
    with engines:
        pass
    engines.on_state(SPEC, EngineState.DOWN, "ended with SIGKILL", None)
    assert shown(console).endswith("[enhanced@1] down: ended with SIGKILL\n")


def test_verbose_shows_everything_on_a_terminal() -> None:
    """For those who want vLLM's own words."""
    console = terminal()
    EngineConsole(console, verbose=True).on_line(SPEC.name, INFO)
    assert "Starting to load" in shown(console)


def test_text_from_engines_is_only_text() -> None:
    """No markup, no colours, no cursor, no window title."""
    console = plain()
    engines = EngineConsole(console)
    engines.on_line(SPEC.name, "[red]x[/] \x1b[2J\x1b]0;title\x07\x9b31m[link=y]\x08 \u202e end")
    engines.on_state(SPEC, EngineState.DOWN, "\x1b[31m[bold]", None)
    assert shown(console).splitlines() == [
        "[enhanced@1] [red]x[/] [link=y]  end",
        "[enhanced@1] down: [bold]",
    ]


def test_an_engine_that_is_being_stopped_says_no_more() -> None:
    """Killed processes complain with errors that mean nothing."""
    console = terminal()
    engines = EngineConsole(console, verbose=True)
    engines.on_state(SPEC, EngineState.READY, "", None)
    engines.on_state(SPEC, EngineState.STOPPING, "", None)
    engines.on_line(SPEC.name, ERROR)
    engines.on_state(SPEC, EngineState.STOPPED, "", None)
    assert "out of memory" not in shown(console)
    assert "stopped" in shown(console)
