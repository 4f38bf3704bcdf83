"""What `transform`, `combine` and `random-like` have in common on the command line."""

import json
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_rvec.cli.printable import titled

if TYPE_CHECKING:
    from vllm_rvec.vector.derive.writing import Derivation
    from vllm_rvec.vector.manifest import Manifest

__all__ = [
    "DtypeOption",
    "EncodingOption",
    "JsonOption",
    "RankOption",
    "show_derivation",
]

EncodingOption: TypeAlias = Annotated[
    str,
    typer.Option(
        help="auto (the smallest lossless, tensor by tensor), dense (plain safetensors), sparse, "
        "int8 (lossy), lowrank (lossy)."
    ),
]
DtypeOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16 (half the size, rounded).",
        show_default="the input's where that is exact, else float32",
    ),
]
RankOption: TypeAlias = Annotated[int, typer.Option(help="Rank of lowrank.")]
JsonOption: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


def show_derivation(made: "Derivation", *, as_json: bool) -> None:
    """Print what was made on stdout: a table, or one JSON object."""
    if as_json:
        typer.echo(json.dumps(_facts(made)))
        return
    # Texts, never markup: names come from files and users.
    table = Table(show_header=False, title=titled("vector", made.output), title_justify="left")
    for name, value in _rows(made):
        table.add_row(name, Text(value))
    Console().print(table)


def _facts(made: "Derivation") -> dict[str, object]:
    return {
        "output": str(made.output),
        "operation": made.step.operation,
        "parameters": made.step.parameters,
        "inputs": list(made.step.inputs),
        **_measures(made.manifest),
        "inputs_measures": [_measures(manifest) for manifest in made.inputs],
        "size_bytes": made.size_bytes,
    }


def _measures(manifest: "Manifest") -> dict[str, int | float | None]:
    entries = manifest.tensors.values()
    changed = [entry.changed for entry in entries]
    is_known = None not in changed
    return {
        "tensors": len(entries),
        "zero_tensors": sum(entry.encoding == "zero" for entry in entries),
        "elements": sum(entry.elements for entry in entries),
        "changed_elements": sum(filter(None, changed)) if is_known else None,
        "norm": sum(entry.norm**2 for entry in entries) ** 0.5,
    }


def _rows(made: "Derivation") -> list[tuple[str, str]]:
    found = _measures(made.manifest)
    inputs = [_measures(manifest) for manifest in made.inputs]
    step = made.step
    asked = ", ".join(f"{name} {value}" for name, value in step.parameters.items())
    before = "of the input" if len(inputs) == 1 else "of the inputs"
    return [
        ("operation", f"{step.operation} ({asked})"),
        ("tensors", f"{found['tensors']} ({found['zero_tensors']} zero)"),
        ("weights", f"{found['elements']:,} ({_share(found)} not zero)"),
        (f"not zero {before}", ", ".join(_share(one) for one in inputs)),
        ("norm", f"{found['norm']:.6g}"),
        (f"norm {before}", ", ".join(f"{one['norm']:.6g}" for one in inputs)),
        ("size", f"{made.size_bytes / 1e6:,.1f} MB"),
    ]


def _share(found: "dict[str, int | float | None]") -> str:
    changed = found["changed_elements"]
    return "unknown" if changed is None else f"{changed / (found['elements'] or 1):.2%}"
