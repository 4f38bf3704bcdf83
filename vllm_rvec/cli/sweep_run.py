"""What `vllm-rvec sweep` does, put together of its parts: plan, engine, questions, report."""

import asyncio
import json
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_rvec.cli.printable import printable
from vllm_rvec.cli.running import run_until_stopped, stop_event
from vllm_rvec.cli.sweep_progress import SweepProgress
from vllm_rvec.cli.sweep_sources import Source, planned_offer, source_of
from vllm_rvec.errors import ConfigError
from vllm_rvec.evaluation.analysis import analyse
from vllm_rvec.evaluation.answers import AnswerFile, locked_folder
from vllm_rvec.evaluation.arms import Plan, placed_arms, wanted_arms
from vllm_rvec.evaluation.asking import Asker, Manner, ask_all
from vllm_rvec.evaluation.config import SweepConfig, load_sweep_config
from vllm_rvec.evaluation.record import SweepRecord, read_record
from vllm_rvec.evaluation.records import Answer, Arm, Task
from vllm_rvec.evaluation.report import print_table, write_reports
from vllm_rvec.evaluation.scoring import grade
from vllm_rvec.evaluation.sweep import (
    Sweep,
    answers_of,
    cost_of,
    facts_of,
    load_tasks,
)
from vllm_rvec.evaluation.tasks import check_task, is_elsewhere

__all__ = ["report_again", "show_plan", "sweep"]

logger = logging.getLogger(__name__)

INTERRUPTED = 130
REPORT_NAME = "report.json"


def sweep(
    path: Path | None,
    given: Mapping[str, object],
    stderr: Console,
    *,
    verbose: bool,
    as_json: bool,
) -> None:
    """Ask what has not been answered yet, and write the report.

    Args:
        path: The YAML file.
        given: Values of the command line.
        stderr: For the log and the progress.
        verbose: Show every line of the engine.
        as_json: Print the report as JSON.

    Raises:
        typer.Exit: Interrupted; what has been answered is kept.
    """
    # A line for each request would bury what is said here.
    logging.getLogger("vllm_rvec.router").setLevel(logging.WARNING)
    config = load_sweep_config(path, given)
    tasks = load_tasks(config)
    with locked_folder(config.folder):
        source = source_of(config, stderr, verbose=verbose)
        plan = placed_arms(wanted_arms(config), source.offer())
        _say_missing(plan)
        command = shlex.join(["vllm-rvec", *sys.argv[1:]])
        begun = Sweep.begin(config, tasks, plan, source.subject(), command)
        _ask(begun, source, stderr)
        _report(config, begun.record, tasks, plan.arms, as_json=as_json)


def report_again(path: Path | None, given: Mapping[str, object], *, as_json: bool) -> None:
    """Write the report again, from what has been answered.

    Args:
        path: The YAML file, for its `output`; else `--output` says where it is.
        given: Values of the command line.
        as_json: Print the report as JSON.

    Raises:
        ConfigError: There is no sweep, or its tasks are no longer what was asked.
    """
    folder = _folder_of(path, given)
    record = read_record(folder)
    if record is None:
        raise ConfigError(f"there is no sweep in {folder}", fix="name its folder: --output")
    config = load_sweep_config(None, record.config | {"output": str(folder)})
    tasks = load_tasks(config)
    changed = [task.name for task in tasks if record.tasks[task.name].digest != task.digest]
    if changed:
        raise ConfigError(
            f"other problems than were asked: {', '.join(changed)}",
            fix="bring the tasks' files back as they were",
        )
    wanted = {one.name for one in wanted_arms(config)} - record.missing.keys()
    arms = [arm.arm() for arm in record.arms if arm.name in wanted]
    _report(config, record, tasks, arms, as_json=as_json)


def show_plan(
    path: Path | None, given: Mapping[str, object], stderr: Console, *, as_json: bool
) -> None:
    """Say what would be asked; ids of the Hub are not looked up.

    Args:
        path: The YAML file.
        given: Values of the command line.
        stderr: For the log.
        as_json: Print it as JSON.
    """
    config = load_sweep_config(path, given)
    how, offer = planned_offer(config, stderr)
    plan = placed_arms(wanted_arms(config), offer)
    elsewhere = [spec for spec in config.tasks if is_elsewhere(spec)]
    for spec in elsewhere:
        check_task(spec, allow_code=config.allow_code)
    here = tuple(spec for spec in config.tasks if spec not in elsewhere)
    tasks = load_tasks(config.model_copy(update={"tasks": here}))
    shown = _plan_facts(config, how, plan, tasks)
    shown["tasks_elsewhere"] = {spec.called: spec.dataset or spec.path for spec in elsewhere}
    if as_json:
        typer.echo(json.dumps(shown))
        return
    _print_plan(shown, plan, tasks)


def _folder_of(path: Path | None, given: Mapping[str, object]) -> Path:
    if given.get("output") is None and path is not None:
        return load_sweep_config(path, given).folder
    return Path(str(given.get("output") or SweepConfig.model_fields["output"].default))


def _say_missing(plan: Plan) -> None:
    for missing in plan.missing:
        logger.warning("without %s: %s", missing.name, missing.why)


def _ask(begun: Sweep, source: Source, stderr: Console) -> None:
    open_arms = [arm for arm in begun.plan.arms if begun.questions([arm])]
    if not open_arms:
        logger.info("all %d answers are there; nothing is asked", begun.total)
        return
    logger.info("%d of %d answers are there already", len(begun.known), begun.total)
    source.prepare(open_arms)
    progress = SweepProgress(stderr, begun.plan.arms, begun.total, begun.known)
    with AnswerFile.open(begun.config.folder) as file:
        if not _run(_Asking(begun, source, open_arms, file, progress)):
            logger.info("done: %s", progress.line())
            return
    logger.warning("stopped: %s", progress.line())
    logger.warning(
        "what has been answered is kept in %s; run the same command again to go on",
        begun.config.folder,
    )
    raise typer.Exit(INTERRUPTED)


class _Asking:
    """Asks what is open, through whoever answers."""

    def __init__(
        self,
        begun: Sweep,
        source: Source,
        arms: Sequence[Arm],
        file: AnswerFile,
        progress: SweepProgress,
    ) -> None:
        self._begun = begun
        self._arms = arms
        self._source = source
        self._file = file
        self._progress = progress

    async def run(self) -> None:
        """Ask all."""
        await self._source.ask(self._arms, self._ask)

    async def _ask(self, arms: Sequence[Arm], manner: Manner) -> None:
        config = self._begun.config
        connector = aiohttp.TCPConnector(limit=0)
        with self._progress:
            async with aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar()
            ) as session:
                asker = Asker(session, manner, grade)
                questions = self._begun.questions(arms)
                await ask_all(questions, asker, self._keep, concurrency=config.max_concurrency)

    def _keep(self, answer: Answer) -> None:
        self._file.keep(answer)
        self._progress.take(answer)


def _run(asking: _Asking) -> bool:
    """Run to the end; True where a signal came first."""
    is_stopped = False

    async def whole() -> None:
        nonlocal is_stopped
        work = asyncio.create_task(asking.run())
        stop = asyncio.create_task(stop_event().wait())
        try:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            is_stopped = not work.done()
        except asyncio.CancelledError:  # a second signal
            is_stopped = True
            raise
        finally:
            stop.cancel()
            if not work.done():
                work.cancel()
                await asyncio.wait({work})
        if not work.cancelled():
            work.result()

    run_until_stopped(whole)
    return is_stopped


def _report(
    config: SweepConfig,
    record: SweepRecord,
    tasks: Sequence[Task],
    arms: Sequence[Arm],
    *,
    as_json: bool,
) -> None:
    answers = answers_of(config, arms, tasks)
    results = analyse(tasks, arms, answers, facts_of(record))
    paths = write_reports(results, config.folder)
    if as_json:
        typer.echo((config.folder / REPORT_NAME).read_text(encoding="utf-8"))
        return
    console = Console()
    print_table(results, console)
    console.print(Text("report: " + ", ".join(map(str, paths))), soft_wrap=True)


def _plan_facts(config: SweepConfig, how: str, plan: Plan, tasks: Sequence[Task]) -> dict[str, Any]:
    cost = cost_of(plan.arms, tasks)
    return {
        "how": how,
        "model": config.model,
        "vector": config.vector,
        "endpoint": config.endpoint,
        "output": config.output,
        "arms": [
            {
                "name": arm.name,
                "kind": arm.kind.value,
                "alpha": arm.alpha,
                "model": arm.model,
                "is_prompted": arm.is_prompted,
            }
            for arm in plan.arms
        ],
        "missing": {one.name: one.why for one in plan.missing},
        "tasks": [
            {
                "name": task.name,
                "problems": len(task.problems),
                "scorer": task.scorer,
                "max_tokens": task.max_tokens,
                "source": task.source,
                "digest": task.digest,
            }
            for task in tasks
        ],
        **asdict(cost),
    }


def _print_plan(facts: Mapping[str, Any], plan: Plan, tasks: Sequence[Task]) -> None:
    table = Table(show_header=False, title="would be asked", title_justify="left")
    for name in ("model", "vector", "endpoint", "how", "output"):
        if facts[name] is not None:
            table.add_row(name, Text(printable(str(facts[name]), 400)))
    for task in tasks:
        said = f"{task.name}: {len(task.problems):,} problems, {task.scorer}, from {task.source}"
        table.add_row("task", Text(printable(said, 400)))
    for name, place in facts["tasks_elsewhere"].items():
        table.add_row("task", Text(printable(f"{name}: {place} on the Hub, not looked up", 400)))
    table.add_row("arms", Text(", ".join(arm.name for arm in plan.arms)))
    for missing in plan.missing:
        table.add_row("without", Text(printable(f"{missing.name}: {missing.why}", 400)))
    more = f", and {len(plan.arms)} for each of the Hub's problems"
    requests = f"{facts['requests']:,}{more if facts['tasks_elsewhere'] else ''}"
    table.add_row("requests", requests)
    read, written = facts["prompt_tokens"], facts["completion_tokens"]
    table.add_row("tokens", f"about {read:,} to read, {written:,} at most to write")
    Console().print(table)
