"""What `serve` and `route` share: stopping on a signal, the log, the address."""

import asyncio
import gc
import logging
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress

import uvloop
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from vllm_rvec.router import Routing

__all__ = [
    "add_aliases",
    "address_of",
    "log_to",
    "run_until_stopped",
    "stop_event",
    "warn_of_restart",
]

logger = logging.getLogger(__name__)

ONLY_AT_START = ("host", "port", "drain_seconds", "admin_key_sha256", "results", "access_log")
"""Settings of the router that a reload does not take in."""

GARBAGE_THRESHOLD = 20_000
"""How many objects more than before make Python look for garbage; its own default is 700."""


def stop_event() -> asyncio.Event:
    """Be told of SIGINT and SIGTERM; a second one cancels the task that asked.

    Call it in the task that runs everything.
    """
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    main = asyncio.current_task()

    def on_signal() -> None:
        if stop.is_set() and main is not None:
            main.cancel()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    return stop


def run_until_stopped(run: Callable[[], Awaitable[None]], *, is_fast: bool = False) -> None:
    """Run to the end; a second Ctrl-C ends it without waiting.

    Args:
        run: Everything.
        is_fast: On uvloop, which takes less time over a request; its child processes are
            not the ones that our supervisor was tested with.
    """

    async def whole() -> None:
        # What was imported stays: looking through it for garbage costs each request some of its
        # time. Requests make few cycles.
        gc.freeze()
        gc.set_threshold(GARBAGE_THRESHOLD)
        await run()

    with suppress(asyncio.CancelledError):
        if is_fast:
            uvloop.run(whole())
        else:
            asyncio.run(whole())


def address_of(host: str, port: int, *, is_tls: bool = False) -> str:
    """Where clients on this machine find the server.

    >>> address_of("0.0.0.0", 8000)
    'http://127.0.0.1:8000'
    """
    scheme = "https" if is_tls else "http"
    host = "127.0.0.1" if host in {"0.0.0.0", "::"} else host
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def add_aliases(table: Table, routing: Routing) -> None:
    """Show what each alias stands for."""
    for name, alias in routing.aliases.items():
        split = ", ".join(f"{variant}: {weight:g}" for variant, weight in alias.split.items())
        table.add_row("alias", Text(f"{name}  ({split})"))


def warn_of_restart(started: Routing, changed: Routing) -> None:
    """Say which changed settings hold only after a restart."""
    names = [n for n in ONLY_AT_START if getattr(started, n, None) != getattr(changed, n, None)]
    if started.tls != changed.tls and None in {started.tls, changed.tls}:
        names.append("tls")
    if names:
        logger.warning("restart for what has changed in: %s", ", ".join(names))


def log_to(console: Console) -> None:
    """Send our own log to stderr, one line per event, around a live display if there is one."""
    handler: logging.Handler = (
        RichHandler(console=console, show_path=False, markup=False, highlighter=None)
        if console.is_terminal
        else logging.StreamHandler()
    )
    if not console.is_terminal:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger = logging.getLogger("vllm_rvec")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
