"""`vllm-rvec extract`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from vllm_rvec.vector.extract import Extraction

__all__ = ["extract_command"]


def extract_command(
    tuned: Annotated[Path, typer.Option(help="Folder of the tuned donor (by GRPO, say).")],
    base: Annotated[Path, typer.Option(help="Folder of the base donor (by SFT, say).")],
    output: Annotated[Path, typer.Option(help="Folder to make; must not exist.")],
    dtype: Annotated[
        str,
        typer.Option(help="float32 (exact), bfloat16 or float16 (half the size, rounded)."),
    ] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Make a stored vector: v = tuned - base, tensor by tensor."""
    from vllm_rvec.vector.extract import extract  # noqa: PLC0415 - torch, two seconds

    columns = (TextColumn("extracting"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("extract", total=None)
        extraction = extract(
            tuned,
            base,
            output,
            dtype=dtype,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if as_json:
        typer.echo(json.dumps(asdict(extraction) | {"output": str(extraction.output)}))
    else:
        Console().print(_table(extraction))


def _table(made: "Extraction") -> Table:
    table = Table(show_header=False, title=f"vector {made.output}", title_justify="left")
    changed = made.changed_elements / (made.elements or 1)
    for name, value in (
        ("tensors", f"{made.tensors} ({made.zero_tensors} without a difference)"),
        ("weights", f"{made.elements:,} ({changed:.1%} differ)"),
        ("norm", f"{made.norm:.4g} ({made.relative_norm:.2%} of the base donor's)"),
        ("size", f"{made.size_bytes / 1e6:,.1f} MB"),
    ):
        table.add_row(name, value)
    return table
