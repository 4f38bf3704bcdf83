"""What our router costs, beside the straight way, vllm-router and LiteLLM: `make bench-router`.

All proxies stand before one stand-in engine, and one load generator asks them in turn, in one run.
Those that are not installed, or don't start, are left out with a word. Ends with status 1 where
both the median and the best round of ours miss a goal by more than 15 % (why: `benchmarks.frame`),
or where a single one of its streams fails.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from benchmarks.frame import Verdict, machine
from benchmarks.router.measure import FULL, TINY, measure, questions
from benchmarks.router.proxies import (
    OURS,
    PROXIES,
    STRAIGHT,
    ProxyError,
    started,
    started_engine,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.router.load import Server
    from benchmarks.router.measure import Question
    from benchmarks.router.proxies import Proxy, Running

__all__ = ["main", "report"]

TITLE = "routers before a stand-in engine"

log = Console(stderr=True)


def main(arguments: Sequence[str] | None = None, proxies: Sequence[Proxy] = PROXIES) -> int:
    """Measure and print; return the exit status.

    Args:
        arguments: Of the command line; the process's own by default.
        proxies: Which to measure.
    """
    options = _parser().parse_args(arguments)
    size = TINY if options.tiny else FULL
    size = replace(size, repeats=options.repeats or size.repeats)
    _allow_open_files(4 * size.streams)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine = stack.enter_context(started_engine())
        running, left_out = _start(proxies, engine, folder, stack)
        figures, failed = measure(engine, running, size, log.print)
    return report(questions(figures, size), left_out | failed, as_json=options.json)


def report(rows: Sequence[Question], left_out: Mapping[str, str], *, as_json: bool) -> int:
    """Print the rows.

    Args:
        rows: From `questions`.
        left_out: Why a proxy was not measured, or not to the end.
        as_json: Whether for machines.

    Returns:
        The exit status: 1 where ours is a regression.
    """
    if as_json:
        facts = [asdict(row) | {"verdict": row.verdict.value} for row in rows]
        json.dump(
            {"machine": machine(), "title": TITLE, "rows": facts, "left_out": left_out}, sys.stdout
        )
        print()
    else:
        Console(width=None if sys.stdout.isatty() else 140).print(_table(rows))
        for name, why in left_out.items():
            print(f"left out: {name}: {why}")
    return int(any(row.verdict is Verdict.REGRESSION for row in rows))


def _start(
    proxies: Sequence[Proxy], engine: Server, folder: Path, stack: ExitStack
) -> tuple[list[Running], dict[str, str]]:
    """Start what there is; ours has to be."""
    running: list[Running] = []
    left_out: dict[str, str] = {}
    for proxy in proxies:
        log.print(f"starting: {proxy.name}")
        try:
            running.append(stack.enter_context(started(proxy, engine, folder)))
        except ProxyError as exc:
            if proxy.name == OURS:
                raise
            left_out[proxy.name] = str(exc)
            log.print(f"left out: {proxy.name}: {exc}", markup=False)
    return running, left_out


def _table(rows: Sequence[Question]) -> Table:
    table = Table(title=TITLE, caption=machine())
    measured = {name for row in rows for name in row.rounds}
    names = [STRAIGHT, *(proxy.name for proxy in PROXIES if proxy.name in measured)]
    table.add_column("what")
    for name in (*names, "goal"):
        table.add_column(name, justify="right")
    table.add_column("verdict of ours")
    for row in rows:
        style = {Verdict.REGRESSION: "bold red", Verdict.MISS: "yellow"}.get(row.verdict, "")
        figures = map(row.shown, names)
        table.add_row(row.name, *figures, row.shown_goal, row.verdict.value, style=style)
    return table


def _allow_open_files(count: int) -> None:
    """Children inherit it: a router has two connections for each stream."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--tiny", action="store_true", help="does it run? The figures mean nothing")
    made.add_argument("--repeats", type=int, help="rounds; the median counts")
    made.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return made


if __name__ == "__main__":
    sys.exit(main())
