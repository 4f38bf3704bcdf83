"""`vllm-rvec sweep`: asks tasks at many alphas, and says which is best and whether that is real.

Here are its options; what it does is put together in `sweep_run`.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_rvec.cli.running import log_to

__all__ = ["sweep_command"]


def sweep_command(  # noqa: PLR0917 - typer passes every option by name
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with all of this; flags given here win.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The target: a local folder or a Hub id.")
    ] = None,
    vector: Annotated[
        str | None,
        typer.Option(help="The stored vector: folder, Hub id\\[@revision] or URL."),
    ] = None,
    alphas: Annotated[
        str | None,
        typer.Option(help="A list, 0.5,1, or first:last:step.", show_default="0.25:1.5:0.25"),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="A file of problems. May be given again.")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="Where variants are served already, in place of an engine of its own."),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(help="Kinds of arms, by commas: base,vector,random.", show_default="all"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Problems of each task.", show_default="all")
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="Of the engine: dial, all arms in one batch; live, weights reloaded between them; "
            "auto takes the dial where it can.",
            show_default="auto",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of halves, order, sampling.", show_default="0")
    ] = None,
    random_seed: Annotated[
        int | None, typer.Option(help="Of the random vector.", show_default="0")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the sampling; 0 is greedy.", show_default="0")
    ] = None,
    max_concurrency: Annotated[
        int | None, typer.Option(help="Requests under way at a time.", show_default="32")
    ] = None,
    retries: Annotated[
        int | None, typer.Option(help="Of a request that failed.", show_default="8")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds that an answer may take.", show_default="600")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(help="Folder for answers and report.", show_default="sweep-results"),
    ] = None,
    no_confirm: Annotated[
        bool,
        typer.Option("--no-confirm", help="Choose the alpha by all problems; none confirm it."),
    ] = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run what models write, where unit tests grade.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be asked, and ask nothing.")
    ] = False,
    report_only: Annotated[
        bool,
        typer.Option("--report-only", help="Write the report again from the answers there are."),
    ] = False,
    verbose: Annotated[
        bool, typer.Option(help="Show every line of the engine, on a terminal too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Find the alpha that is best, and whether it is better than the target as it is.

    Run again, it goes on where it stopped. What stands after -- goes to vLLM's engine.
    """
    given = {
        "model": model,
        "vector": vector,
        "alphas": alphas,
        "tasks": task or None,
        "endpoint": endpoint,
        "arms": None if arms is None else [kind.strip() for kind in arms.split(",")],
        "limit": limit,
        "mode": mode,
        "seed": seed,
        "random_seed": random_seed,
        "temperature": temperature,
        "max_concurrency": max_concurrency,
        "retries": retries,
        "timeout_seconds": timeout,
        "output": output,
        "confirm": False if no_confirm else None,
        "allow_code": allow_code or None,
        "engine_words": tuple(context.args) or None,
    }
    from vllm_rvec.cli import sweep_run  # noqa: PLC0415 - scipy and more, a second

    stderr = Console(stderr=True)
    log_to(stderr)
    if report_only:
        sweep_run.report_again(config, given, as_json=as_json)
    elif dry_run:
        sweep_run.show_plan(config, given, stderr, as_json=as_json)
    else:
        sweep_run.sweep(config, given, stderr, verbose=verbose, as_json=as_json)
