"""`vllm-rvec verify`."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_rvec.cli.locating import find_vector
from vllm_rvec.cli.printable import titled
from vllm_rvec.cli.progress import show_progress
from vllm_rvec.vector.reader import VectorReader
from vllm_rvec.vector.verification import Verification, examine

__all__ = ["verify_command"]


def verify_command(
    vector: Annotated[str, typer.Argument(help="The vector: folder, Hub id\\[@revision] or URL.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Check every byte of a vector: digests, headers, values.

    Always reads everything; what it finds sound, `serve` does not read again.
    """
    reader = VectorReader(find_vector(vector).folder)
    with show_progress("verifying") as on_progress:
        found = examine(reader, on_progress=on_progress)
    if as_json:
        typer.echo(json.dumps(_facts(found, reader)))
    else:
        Console().print(_table(found))
    found.raise_for_problems()


def _facts(found: Verification, reader: VectorReader) -> dict[str, object]:
    return {
        "vector": str(found.folder),
        "sound": not found.problems,
        "tensors": len(reader.manifest.tensors),
        "digest": reader.manifest.digest,
        "files": {
            name: {"size_bytes": size_bytes, "problems": _problems_of(name, found)}
            for name, size_bytes in found.size_bytes.items()
        },
    }


def _table(found: Verification) -> Table:
    table = Table(title=titled("vector", found.folder), title_justify="left")
    table.add_column("file", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("verdict")
    for name, size_bytes in found.size_bytes.items():
        problems = _problems_of(name, found)
        verdict = Text("\n".join(problems), "red") if problems else Text("sound", "green")
        table.add_row(Text(name), f"{size_bytes / 1e6:,.1f} MB", verdict)
    if not found.size_bytes:
        table.add_row("none", "", Text("sound: all its tensors are zero", "green"))
    return table


def _problems_of(name: str, found: Verification) -> list[str]:
    return [problem.where_and_what for problem in found.problems if problem.file == name]
