"""The tables of `vllm-rvec inspect`, for a terminal."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from vllm_rvec.cli.printable import printable
from vllm_rvec.vector.statistics import (
    ENERGY_RANKS,
    TOP,
    Grid,
    LossyError,
    Statistics,
    Stored,
    Sums,
    make_grid,
    typical_range,
)

if TYPE_CHECKING:
    from vllm_rvec.vector.encoding_costs import EncodingCost
    from vllm_rvec.vector.manifest import Donor, Manifest, Step

__all__ = ["costs_table", "facts_table", "kinds_table", "layers_table", "stored_table"]

MAX_ROWS = 32
"""Of the table of layers: a screen."""
LABEL_WIDTH, CELL_WIDTH, END_WIDTH = 6, 6, 8
"""Columns of the table of layers."""
MAX_HEADER = 9
WIDE = 100
"""A terminal that has room for one more column."""
MAX_KINDS_SHOWN = 24
"""Lines of the table of kinds."""

HEAT = ((24, 35, 78), (37, 82, 138), (33, 145, 140), (122, 209, 81), (253, 231, 37))
"""Dark to bright, in even steps."""


def facts_table(
    title: str, manifest: "Manifest", total: Sums, size_bytes: int, lossy: LossyError
) -> Table:
    """Say what a vector is and where it comes from."""
    shown = Text(f"vector {printable(title)}")
    table = Table(show_header=False, title=shown, title_justify="left", box=SIMPLE_HEAD)
    table.add_column(no_wrap=True)
    table.add_column()
    changed = "not counted which are"
    if total.changed_share is not None:
        changed = f"{percent(total.changed_share)} %"
    relative = percent(total.relative_norm)
    rows = {
        "formula": f"{manifest.formula}, {'all' if manifest.complete else 'some'} of the tensors",
        "tuned": _donor(manifest.donors.tuned),
        "base": _donor(manifest.donors.base),
        "architecture": f"{manifest.architecture or '?'} ({manifest.model_type or '?'})",
        "vocabulary": _vocabulary(manifest),
        "made": f"{manifest.created} by {manifest.tool}",
        "since then": _lineage(manifest),
        "weights": f"{total.weights:,} in {total.tensors:,} tensors, {changed} changed",
        "norm": f"{total.norm:.4g}, {relative} % of the base donor's",
        "base + v is tuned": _exactness(manifest),
        "lost in encoding": _lossy(lossy),
        "files": f"{len(manifest.files)}, {size_bytes / 1e6:,.1f} MB",
    }
    for name, value in rows.items():
        table.add_row(name, Text(printable(value, 400)))
    return table


def stored_table(stored: Sequence[Stored]) -> Table:
    """Count tensors and bytes by encoding."""
    table = _numbers("stored as", "encoding", ("tensors", "weights", "MB", "bytes/weight"))
    for item in stored:
        table.add_row(
            Text(f"{item.encoding} {printable(item.dtype)}".strip()),
            f"{item.tensors:,}",
            f"{item.weights:,}",
            f"{item.size_bytes / 1e6:,.1f}",
            f"{item.size_bytes / (item.weights or 1):.2f}",
        )
    return table


def kinds_table(statistics: Statistics) -> Table:
    """Sum up by kind of module; the kinds that do not fit are summed up in one line."""
    columns = ["tensors", "weights", "norm", "changed"]
    title = "by kind of module, in %: norm relative to the base donor's, weights changed"
    if statistics.spectra:
        columns += [*(f"top {rank}" for rank in ENERGY_RANKS), "rank 90"]
        title += ",\nenergy in the largest singular values of each matrix, rank that keeps 90 %"
    table = _numbers(title, "kind", columns)
    has_energy = bool(statistics.spectra)
    for kind, sums in statistics.by_kind(MAX_KINDS_SHOWN).items():
        table.add_row(Text(printable(kind, 24)), *_kind_cells(sums, has_energy=has_energy))
    table.add_row(Text("all", "bold"), *_kind_cells(statistics.total(), has_energy=has_energy))
    return table


def layers_table(statistics: Statistics, width: int) -> Table:
    """Show the relative norm by layer and kind, as numbers on heat.

    Args:
        statistics: The vector's numbers.
        width: Columns of the terminal.
    """
    has_energy = bool(statistics.spectra) and width >= WIDE
    taken = LABEL_WIDTH + CELL_WIDTH + END_WIDTH * (2 if has_energy else 1)
    grid = make_grid(statistics, MAX_ROWS, max(3, (width - taken) // CELL_WIDTH))
    title = Text("by layer: norm in % of the base donor's")
    table = Table(box=None, padding=0, title=title, title_justify="left", show_footer=True)
    table.add_column("layer", footer="all", min_width=LABEL_WIDTH, no_wrap=True)
    heat = _Heat([*grid.cells.values(), *grid.outside.values()])
    for kind in grid.kinds:
        total = heat.cell(grid.by_kind[kind])
        header = Text(" " + printable(kind, MAX_HEADER))
        table.add_column(header, footer=total, justify="right", min_width=CELL_WIDTH, no_wrap=True)
    _add_totals(table, statistics, heat, has_energy=has_energy)
    for number, label in enumerate(grid.rows):
        sums = grid.by_row[number]
        cells = [heat.cell(grid.cells.get((number, kind))) for kind in grid.kinds]
        table.add_row(label, *cells, heat.cell(sums), *_row_ends(sums, has_energy=has_energy))
    table.caption = _outside(grid, heat)
    table.caption_justify = "left"
    return table


def costs_table(costs: Iterable["EncodingCost"], title: str) -> Table:
    """Compare encodings: what each would take and lose."""
    columns = ("MB", "% of F32", "% of BF16", "error %", "worst %", "as asked")
    table = _numbers(title, "encoding", columns)
    for cost in costs:
        asked = cost.stored[cost.choice.encoding]
        table.add_row(
            cost.name,
            f"{cost.size_bytes / 1e6:,.2f}",
            percent(cost.ratio("F32")),
            percent(cost.ratio("BF16")),
            percent(cost.error),
            percent(cost.worst),
            "" if cost.choice.encoding == "auto" else f"{asked} of {cost.stored.total()}",
        )
    return table


def percent(share: float | None) -> str:
    """Write a share in percent, in at most six characters where it is below 1000 %.

    >>> [percent(share) for share in (1, 0.123, 0.00567, 0.0000891, 3e-9, 0, None)]
    ['100', '12.3', '0.57', '0.009', '3e-7', '0', '-']
    """
    if share is None:
        return "-"
    value = share * 100
    if value >= 1000 or 0 < value < 0.001:
        mantissa, _, exponent = f"{value:.0e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    digits = 0 if value in {0, 100} or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{3 if 0 < value < 0.01 else digits}f}"


class _Heat:
    """Cells coloured by the logarithm of a relative norm, over its typical range."""

    def __init__(self, sums: Iterable[Sums]) -> None:
        low, high = typical_range((item.relative_norm, item.weights) for item in sums)
        self._low, self._high = math.log(low), math.log(high)

    def cell(self, sums: Sums | None) -> Text:
        """Show a relative norm."""
        norm = None if sums is None else sums.relative_norm
        text = "" if sums is None else percent(norm)
        return Text(f" {text}", style=self._style(norm) if norm else "")

    def _style(self, norm: float) -> str:
        span = self._high - self._low
        place = (math.log(norm) - self._low) / span if span else 0.5
        place = min(1.0, max(0.0, place)) * (len(HEAT) - 1)
        lower = min(int(place), len(HEAT) - 2)
        mixed = [
            round(a + (b - a) * (place - lower))
            for a, b in zip(HEAT[lower], HEAT[lower + 1], strict=True)
        ]
        is_bright = 0.3 * mixed[0] + 0.6 * mixed[1] + 0.1 * mixed[2] > 110
        return f"{'black' if is_bright else 'white'} on #{mixed[0]:02x}{mixed[1]:02x}{mixed[2]:02x}"


def _add_totals(table: Table, statistics: Statistics, heat: _Heat, *, has_energy: bool) -> None:
    inside = statistics.sums_by(lambda p: None if p.layer is None else "all").get("all", Sums())
    table.add_column(" all", footer=heat.cell(inside), justify="right", min_width=CELL_WIDTH)
    for name, footer in zip(
        (" changed", "  top 16"), _row_ends(inside, has_energy=has_energy), strict=False
    ):
        table.add_column(name, footer=footer, justify="right", no_wrap=True)


def _row_ends(sums: Sums, *, has_energy: bool) -> list[str]:
    ends = [percent(sums.changed_share)]
    return [*ends, percent(sums.energy_share(16))] if has_energy else ends


def _outside(grid: Grid, heat: _Heat) -> Text:
    text = Text("outside the layers:", style="not italic not dim")
    for kind, sums in grid.outside.items():
        text.append(f"  {printable(kind, 24)}").append_text(heat.cell(sums)).append(" ")
    return text if grid.outside else Text()


def _kind_cells(sums: Sums, *, has_energy: bool) -> list[str]:
    cells = [
        f"{sums.tensors:,}",
        _metric(sums.weights),
        percent(sums.relative_norm),
        percent(sums.changed_share),
    ]
    if has_energy:
        cells += [percent(sums.energy_share(rank)) for rank in ENERGY_RANKS]
        cells.append("-" if not sums.energy else str(sums.rank or f">{TOP}"))
    return cells


def _metric(count: int) -> str:
    for power, unit in ((9, "B"), (6, "M"), (3, "K")):
        if count >= 10**power:
            return f"{count / 10**power:.3g}{unit}" if count < 10 ** (power + 3) else f"{count:.1e}"
    return str(count)


def _numbers(title: str, first: str, columns: Iterable[str]) -> Table:
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _donor(donor: "Donor") -> str:
    revision = f"@{donor.revision}" if donor.revision else ""
    return f"{donor.id}{revision} (license: {donor.license or 'not known'})"


def _vocabulary(manifest: "Manifest") -> str:
    found = manifest.vocabulary
    rows = f"{_count(found.tuned_rows)} rows tuned, {_count(found.base_rows)} base"
    policy = "" if found.policy == "strict" else "; the vector has the rows of both"
    tying = "tied" if manifest.tie_word_embeddings else "not tied"
    known = manifest.tokenizer
    size = len(known.packed_hashes) // 2 if known else None
    tokens = "no tokenizer" if size is None else f"a tokenizer of {size:,}"
    return f"{rows}{policy}; {tokens}; embeddings {tying}"


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _lineage(manifest: "Manifest") -> str:
    return "; ".join(map(_step, manifest.lineage)) or "nothing was done to it"


def _step(step: "Step") -> str:
    told = ", ".join(f"{name}={value}" for name, value in step.parameters.items())
    return f"{step.operation} ({told})" if told else step.operation


def _exactness(manifest: "Manifest") -> str:
    found = manifest.roundtrip
    if found is None:
        return "not counted"
    if found.exact == found.weights:
        return f"bit for bit, all {found.weights:,} weights"
    return (
        f"for {found.exact:,} of {found.weights:,} weights; {found.one_unit_off:,} are one unit "
        f"off, {found.further_off:,} further"
    )


def _lossy(lossy: LossyError) -> str:
    if lossy.worst_tensor is None:
        return "nothing"
    worst = printable(lossy.worst_tensor)
    return f"{percent(lossy.overall)} % of the norm; at most {percent(lossy.worst)} % ({worst})"
