"""`vllm-rvec import-lora` and `vllm-rvec export-lora`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_rvec.checkpoint.fetch import locate_adapter, locate_checkpoint
from vllm_rvec.cli.locating import find_vector
from vllm_rvec.cli.printable import titled
from vllm_rvec.cli.progress import show_progress

if TYPE_CHECKING:
    from vllm_rvec.vector.lora.exporting import Exported, LoraExport
    from vllm_rvec.vector.lora.importing import LoraImport

__all__ = ["export_lora_command", "import_lora_command"]


def import_lora_command(
    adapter: Annotated[
        str, typer.Argument(help="The PEFT adapter: folder or Hub id\\[@revision].")
    ],
    output: Annotated[Path, typer.Option(help="Folder to make; must not exist.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="The checkpoint it was trained on: folder or Hub id\\[@revision].",
            show_default="the folder that the adapter names, if there is one",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Make a stored vector of a LoRA adapter: v = scaling * B @ A, its factors as they are."""
    from vllm_rvec.vector.lora.importing import import_lora  # noqa: PLC0415 - torch, two seconds

    located = locate_adapter(adapter)
    found = None if base is None else locate_checkpoint(base)
    with show_progress("importing") as on_progress:
        made = import_lora(located, output, base=found, on_progress=on_progress)
    if as_json:
        typer.echo(json.dumps(_import_facts(made)))
        return
    Console().print(_import_table(made))


def export_lora_command(  # noqa: PLR0917 - typer passes every option by name
    vector: Annotated[
        str, typer.Argument(help="The stored vector: folder, Hub id\\[@revision] or URL.")
    ],
    rank: Annotated[int, typer.Option(help="Largest rank of a module's factors.")],
    output: Annotated[Path, typer.Option(help="Folder to make; must not exist.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="What the adapter names as the model it belongs to.", show_default="base donor"
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the factors: float32, or bfloat16 (half the size, rounded).")
    ] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Make a LoRA adapter of a vector's linear weights, by truncated SVD, and say what it keeps."""
    from vllm_rvec.vector.lora.exporting import export_lora  # noqa: PLC0415 - torch, two seconds

    located = find_vector(vector)
    with show_progress("exporting") as on_progress:
        made = export_lora(
            located, output, rank=rank, base=base, dtype=dtype, on_progress=on_progress
        )
    if as_json:
        typer.echo(json.dumps(_export_facts(made)))
        return
    for table in (_modules_table(made), _export_table(made)):
        Console().print(table)


def _import_facts(made: "LoraImport") -> dict[str, object]:
    entries = made.manifest.tensors.values()
    return {
        "output": str(made.output),
        "base": made.base,
        "complete": made.manifest.complete,
        "tensors": len(entries),
        "changed_tensors": sum(entry.encoding != "zero" for entry in entries),
        "ranks": list(made.ranks),
        "scalings": list(made.scalings),
        "norm": made.norm,
        "relative_norm": made.relative_norm,
        "size_bytes": made.size_bytes,
    }


def _import_table(made: "LoraImport") -> Table:
    table = Table(show_header=False, title=titled("vector", made.output), title_justify="left")
    entries = made.manifest.tensors.values()
    changed = sum(entry.encoding != "zero" for entry in entries)
    share = "" if made.relative_norm is None else f" ({made.relative_norm:.2%} of the base's)"
    coverage = f"{changed} of the base's {len(entries)} are changed"
    if not made.manifest.complete:
        coverage = f"{changed}; names and shapes are unchecked, for the base is not at hand"
    for name, value in (
        ("tensors", coverage),
        ("rank", ", ".join(map(str, made.ranks))),
        ("scaling", ", ".join(f"{scaling:g}" for scaling in made.scalings)),
        ("norm", f"{made.norm:.4g}{share}"),
        ("size", f"{made.size_bytes / 1e6:,.1f} MB"),
    ):
        table.add_row(name, value)
    return table


def _export_facts(made: "LoraExport") -> dict[str, object]:
    return {
        "output": str(made.output),
        "base": made.base,
        "rank": made.rank,
        "max_lora_rank": made.max_lora_rank,
        "scaling": made.scaling,
        "kept_percent": 100 * made.kept,
        "kept_percent_of_linear": 100 * made.kept_of_linear,
        "left_out_percent": {why: 100 * share for why, share in made.left_out.items()},
        "size_bytes": made.size_bytes,
        "tensors": [_tensor_facts(tensor) for tensor in made.tensors],
    }


def _tensor_facts(tensor: "Exported") -> dict[str, object]:
    return {
        "name": tensor.name,
        "how": tensor.how,
        "rank": tensor.rank,
        "norm": tensor.squared_norm**0.5,
        "kept_percent": 100 * tensor.kept,
    }


def _modules_table(made: "LoraExport") -> Table:
    table = Table("weight", "made by", title="energy kept, ||BA||² / ||v||²", title_justify="left")
    for column in ("rank", "kept"):
        table.add_column(column, justify="right")
    for tensor in made.tensors:
        if tensor.rank:
            table.add_row(Text(tensor.name), tensor.how, f"{tensor.rank}", f"{tensor.kept:.2%}")
    return table


def _export_table(made: "LoraExport") -> Table:
    table = Table(show_header=False, title=titled("adapter", made.output), title_justify="left")
    limit = made.max_lora_rank
    served = f"--max-lora-rank {limit}" if limit else "too high to serve"
    table.add_row("rank", f"{made.rank} (vLLM: {served})")
    table.add_row("kept of linear weights", f"{made.kept_of_linear:.2%}")
    for why, share in made.left_out.items():
        count = sum(tensor.how == why for tensor in made.tensors)
        table.add_row(f"left out: {why}", f"{count} tensors, {share:.2%} of the energy")
    table.add_row("kept in all", f"{made.kept:.2%}")
    table.add_row("size", f"{made.size_bytes / 1e6:,.1f} MB")
    return table
