"""`vllm-rvec check`."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_rvec.checkpoint.fetch import locate_checkpoint
from vllm_rvec.cli.printable import printable
from vllm_rvec.cli.recipes import RecipeOption, choose_vectors
from vllm_rvec.vector.compatibility import Report, Verdict, check_target
from vllm_rvec.vector.reader import VectorReader

__all__ = ["check_command"]

REFUSED_STATUS = 7
"""The exit status of a refusal: that of IncompatibleVectorError in `cli.main`."""

STYLES = {Verdict.PASS: "green", Verdict.WARN: "yellow", Verdict.REFUSE: "bold red"}

SHOWN_FINDINGS = 8
"""Lines of one verdict in a level of the table; `--json` has them all."""


def check_command(
    target: Annotated[
        str, typer.Option(help="The model it would be added to: folder or Hub id\\[@revision].")
    ],
    vector: Annotated[
        str | None, typer.Argument(help="The stored vector: folder, Hub id\\[@revision] or URL.")
    ] = None,
    recipe: RecipeOption = None,
    vocab: Annotated[
        str | None,
        typer.Option(
            show_default="strict",
            help="For a target with another number of embedding rows: strict refuses, common adds "
            "the shared rows, skip-embeddings adds none.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Check whether a vector belongs to a target, or each of a recipe: structure, tokens, lineage.

    Exits with 0 on pass and warn, with 7 on refuse.
    """
    chosen = choose_vectors([] if vector is None else [vector], recipe, vocab)
    folder = locate_checkpoint(target).folder
    reports = [
        check_target(VectorReader(found.folder), folder, vocabulary=chosen.vocabulary, recipe=said)
        for found, said in zip(chosen.vectors, chosen.recipe or (None,), strict=True)
    ]
    if as_json:
        facts = [report.as_json() for report in reports]
        typer.echo(json.dumps(facts[0] if recipe is None else {"vectors": facts}))
    else:
        for report in reports:
            Console().print(_table(report))
    if any(report.verdict is Verdict.REFUSE for report in reports):
        raise typer.Exit(REFUSED_STATUS)


def _table(report: Report) -> Table:
    # Texts, never markup: names and tokens come from files.
    title = Text(f"{printable(report.vector, 400)} for {printable(report.target, 400)}: ").append(
        report.verdict.value, STYLES[report.verdict]
    )
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("level")
    table.add_column("verdict")
    table.add_column("evidence", overflow="fold")
    for level in report.levels:
        lines = Text("\n").join(
            Text(line, "" if verdict is Verdict.PASS else STYLES[verdict])
            for verdict in reversed(Verdict)
            for line in _shown(level.texts(verdict))
        )
        table.add_row(level.name, Text(level.verdict.value, STYLES[level.verdict]), lines)
    return table


def _shown(lines: tuple[str, ...]) -> tuple[str, ...]:
    if len(lines) <= SHOWN_FINDINGS:
        return lines
    return (*lines[:SHOWN_FINDINGS], f"... and {len(lines) - SHOWN_FINDINGS} more")
