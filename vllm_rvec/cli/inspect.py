"""`vllm-rvec inspect`."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vllm_rvec.cli.heatmap import check_plot, save_heatmap
from vllm_rvec.cli.inspect_tables import (
    costs_table,
    facts_table,
    kinds_table,
    layers_table,
    stored_table,
)
from vllm_rvec.cli.locating import find_vector
from vllm_rvec.cli.progress import show_progress
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.statistics import (
    ENERGY_RANKS,
    Spectrum,
    Statistics,
    Sums,
    has_spectrum,
    lossy_error,
    stored_as,
)

if TYPE_CHECKING:
    from vllm_rvec.vector.encoding_costs import EncodingCost

__all__ = ["inspect_command"]

QUICK_WEIGHTS = 20_000_000
"""Singular values of so many weights take up to about five seconds on two cores."""
WEIGHTS_PER_SECOND = 50_000_000
"""Of large matrices, on two cores."""


def inspect_command(
    vector: Annotated[str, typer.Argument(help="The vector: folder, Hub id\\[@revision] or URL.")],
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw a heat map, layer by module, to this .png, .svg or .pdf."),
    ] = None,
    spectrum: Annotated[
        bool | None,
        typer.Option(
            help="Compute the energy in the top singular values. It reads all data: about 20 s "
            "for each billion weights on two cores.",
            show_default="for small vectors",
        ),
    ] = None,
    encodings: Annotated[
        bool, typer.Option(help="Say what each encoding would take and lose.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Show what a vector is, where it comes from, and where in the model it is large."""
    if plot is not None:
        check_plot(plot)
    located = find_vector(vector)
    reader = VectorReader(located.folder)
    statistics = Statistics(reader.manifest, _spectra(reader, is_wanted=spectrum))
    costs = _costs(reader) if encodings else []
    title = f"{located.id}@{located.revision}" if located.revision else located.id
    if as_json:
        typer.echo(json.dumps(_facts(located.folder, reader, statistics, costs), allow_nan=False))
    else:
        _print(title, reader, statistics, costs)
    if plot is not None:
        save_heatmap(statistics, title, plot)


def _spectra(reader: VectorReader, *, is_wanted: bool | None) -> dict[str, Spectrum]:
    entries = reader.manifest.tensors.values()
    weights = sum(entry.elements for entry in entries if has_spectrum(entry))
    if is_wanted is None and weights > QUICK_WEIGHTS:
        seconds = weights / WEIGHTS_PER_SECOND
        typer.echo(
            "singular values are not computed, they would take about "
            f"{seconds:,.0f} s on two cores: --spectrum",
            err=True,
        )
    if not weights or (is_wanted is None and weights > QUICK_WEIGHTS) or is_wanted is False:
        return {}
    from vllm_rvec.vector.spectrum import spectra  # noqa: PLC0415 - torch, two seconds

    with show_progress("singular values") as on_progress:
        return spectra(reader, on_progress)


def _costs(reader: VectorReader) -> "list[EncodingCost]":
    from vllm_rvec.vector.encoding_costs import (  # noqa: PLC0415 - torch, two seconds
        encoding_costs,
        tensors_of,
    )

    with show_progress("encodings") as on_progress:
        return encoding_costs(tensors_of(reader, on_progress))


def _print(
    title: str, reader: VectorReader, statistics: Statistics, costs: "list[EncodingCost]"
) -> None:
    manifest, console = reader.manifest, Console()
    size_bytes = manifest.size_bytes
    tables = [
        facts_table(title, manifest, statistics.total(), size_bytes, lossy_error(manifest)),
        stored_table(stored_as(reader)),
        kinds_table(statistics),
        layers_table(statistics, console.width),
    ]
    if costs:
        tables.append(
            costs_table(costs, "what each encoding would take, and lose (relative error)")
        )
    for table in tables:
        console.print(table)


def _facts(
    folder: Path, reader: VectorReader, statistics: Statistics, costs: "list[EncodingCost]"
) -> dict[str, object]:
    manifest = reader.manifest
    lossy = lossy_error(manifest)
    by_layer = statistics.sums_by(lambda p: p.layer)
    outside = statistics.sums_by(lambda p: "outside" if p.layer is None else None)
    by_place = statistics.sums_by(lambda p: p)
    return {
        "vector": str(folder),
        **manifest.model_dump(mode="json", exclude={"tensors", "sketch", "tokenizer"}),
        "tokens": None
        if manifest.tokenizer is None
        else len(manifest.tokenizer.packed_hashes) // 2,
        "has_sketch": manifest.sketch is not None,
        "lossy": {"error": lossy.overall, "worst": lossy.worst, "tensor": lossy.worst_tensor},
        "stored_as": [item._asdict() for item in stored_as(reader)],
        "total": _numbers(statistics.total()),
        "kinds": {kind: _numbers(sums) for kind, sums in statistics.by_kind().items()},
        "layers": [{"layer": n} | _numbers(by_layer[n]) for n in sorted(by_layer)],
        "no_layer": _numbers(outside.get("outside", Sums())),
        "cells": [place._asdict() | _numbers(sums) for place, sums in by_place.items()],
        "tensors": {name: _tensor(statistics, name) for name in manifest.tensors},
        "encodings": [_cost(cost) for cost in costs],
    }


def _tensor(statistics: Statistics, name: str) -> dict[str, object]:
    entry = statistics.entries[name]
    told = {"shape": list(entry.shape), "dtype": entry.dtype, "encoding": entry.encoding}
    numbers = _numbers(statistics.of_tensor(name))
    del numbers["tensors"]
    return statistics.places[name]._asdict() | told | {"error": entry.error} | numbers


def _numbers(sums: Sums) -> dict[str, object]:
    told: dict[str, object] = {
        "tensors": sums.tensors,
        "weights": sums.weights,
        "norm": _finite(sums.norm),
        "relative_norm": sums.relative_norm,
        "changed_share": sums.changed_share,
    }
    if sums.energy:
        told["energy"] = {str(rank): sums.energy_share(rank) for rank in ENERGY_RANKS}
        told["rank_90"] = sums.rank
    return told


def _cost(cost: "EncodingCost") -> dict[str, object]:
    return {
        "encoding": cost.name,
        "size_bytes": cost.size_bytes,
        "of_dense_float32": cost.ratio("F32"),
        "of_dense_bfloat16": cost.ratio("BF16"),
        "error": cost.error,
        "worst": cost.worst,
        "worst_tensor": cost.worst_tensor,
        "stored_as": dict(cost.stored),
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
