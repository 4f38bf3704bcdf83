"""`vllm-rvec extract`."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_rvec.checkpoint.fetch import locate_checkpoint
from vllm_rvec.cli.printable import titled
from vllm_rvec.cli.progress import show_progress
from vllm_rvec.vector.compatibility import Verdict, check_lineage

if TYPE_CHECKING:
    from vllm_rvec.vector.extract import Extraction

__all__ = ["extract_command"]


def extract_command(  # noqa: PLR0917 - typer passes every option by name
    tuned: Annotated[
        str, typer.Option(help="The tuned donor (by GRPO, say): folder or Hub id\\[@revision].")
    ],
    base: Annotated[
        str, typer.Option(help="The base donor (by SFT, say): folder or Hub id\\[@revision].")
    ],
    output: Annotated[Path, typer.Option(help="Folder to make; must not exist.")],
    dtype: Annotated[
        str,
        typer.Option(help="float32 (exact), bfloat16 or float16 (half the size, rounded)."),
    ] = "float32",
    encoding: Annotated[
        str,
        typer.Option(
            help="auto (the smallest lossless, tensor by tensor), dense (plain safetensors), "
            "sparse, int8 (lossy), lowrank (lossy)."
        ),
    ] = "auto",
    rank: Annotated[int, typer.Option(help="Rank of lowrank.")] = 16,
    vocab: Annotated[
        str,
        typer.Option(
            help="strict, or common: the shared rows of donors whose vocabularies differ in size."
        ),
    ] = "strict",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Make a stored vector: v = tuned - base, tensor by tensor."""
    from vllm_rvec.vector.extract import extract  # noqa: PLC0415 - torch, two seconds

    tuned_donor, base_donor = locate_checkpoint(tuned), locate_checkpoint(base)
    with show_progress("extracting") as on_progress:
        made = extract(
            tuned_donor,
            base_donor,
            output,
            dtype=dtype,
            encoding=encoding,
            rank=rank,
            vocabulary=vocab,
            on_progress=on_progress,
        )
    for note in _doubts(made, tuned_donor.folder):
        Console(stderr=True).print(Text("warning: ", "yellow").append(note), soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(_facts(made)))
        return
    for table in (_summary(made), _encodings(made)):
        Console().print(table)


def _doubts(made: "Extraction", tuned: Path) -> Iterator[str]:
    """Say why this may not be what was meant: the wrong folder is easily given."""
    if not made.changed_elements:
        yield "the donors are equal in every weight: the vector is zero"
    for line in check_lineage(made.manifest, tuned).texts(Verdict.REFUSE):
        yield f"the tuned donor does not look tuned from the base: {line}"


def _facts(made: "Extraction") -> dict[str, object]:
    manifest = made.manifest
    return {
        "output": str(made.output),
        "tensors": len(manifest.tensors),
        "elements": made.elements,
        "changed_elements": made.changed_elements,
        "norm": made.norm,
        "relative_norm": made.relative_norm,
        "error": made.error,
        "size_bytes": made.size_bytes,
        "roundtrip": None if manifest.roundtrip is None else manifest.roundtrip.model_dump(),
        "vocabulary": manifest.vocabulary.model_dump(),
        "encodings": {f"{e} {d}": count for (e, d), (count, _) in _by_encoding(made).items()},
    }


def _summary(made: "Extraction") -> Table:
    table = Table(show_header=False, title=titled("vector", made.output), title_justify="left")
    changed = made.changed_elements / (made.elements or 1)
    for name, value in (
        ("weights", f"{made.elements:,} ({changed:.1%} differ)"),
        ("norm", f"{made.norm:.4g} ({made.relative_norm:.2%} of the base donor's)"),
        ("size", f"{made.size_bytes / 1e6:,.1f} MB"),
        ("base + v is tuned", _exactness(made)),
    ):
        table.add_row(name, value)
    return table


def _exactness(made: "Extraction") -> str:
    found = made.manifest.roundtrip
    if found is None:
        return f"nearly: the encoding's relative error is {made.error:.2%}"
    if found.exact == found.weights:
        return "bit for bit"
    off = found.weights - found.exact
    return (
        f"but for {off:,} weights ({off / found.weights:.3%}): {found.one_unit_off:,} are one "
        f"unit off, {found.further_off:,} further"
    )


def _by_encoding(made: "Extraction") -> dict[tuple[str, str], tuple[int, int]]:
    """Count tensors and weights by encoding and dtype."""
    found: dict[tuple[str, str], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for entry in made.manifest.tensors.values():
        key = entry.encoding, entry.dtype
        count, elements = found[key]
        found[key] = count + 1, elements + entry.elements
    return dict(sorted(found.items()))


def _encodings(made: "Extraction") -> Table:
    table = Table("encoding", "dtype", title="stored as", title_justify="left")
    for column in ("tensors", "weights"):
        table.add_column(column, justify="right")
    for (encoding, dtype), (count, elements) in _by_encoding(made).items():
        table.add_row(encoding, "" if encoding == "zero" else dtype, f"{count}", f"{elements:,}")
    return table
