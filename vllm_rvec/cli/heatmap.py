"""The picture of `vllm-rvec inspect --plot`: layers by kinds of module. Needs matplotlib."""

import importlib.util
import io
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_rvec.cli.printable import printable
from vllm_rvec.errors import ConfigError
from vllm_rvec.vector.statistics import Grid, Statistics, Sums, make_grid, typical_range

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["check_plot", "save_heatmap"]

SUFFIXES = (".png", ".svg", ".pdf")
MAX_ROWS = 128
"""Layers of the largest models have a row each."""
MAX_KINDS = 14
LARGEST = 1e30
"""What a manifest may claim beyond it is drawn as this: scales of colour overflow."""
MAX_TICKS = 33
"""Rows with a label."""


class _Panel(NamedTuple):
    """One of the heat maps."""

    title: str
    unit: str
    value: Callable[[Sums], float | None]
    colours: str
    is_logarithmic: bool

    @property
    def extend(self) -> str:
        """Where values may be beyond the scale, whose last colour they then have."""
        return "both" if self.is_logarithmic else "neither"


PANELS = (
    _Panel(
        "relative norm", "% of the base donor's norm", lambda s: s.relative_norm, "viridis", True
    ),
    _Panel("changed weights", "% of the weights", lambda s: s.changed_share, "cividis", False),
    _Panel(
        "energy in the top 16 singular values",
        "% of the squared norm",
        lambda s: s.energy_share(16),
        "magma",
        False,
    ),
)


def check_plot(path: Path) -> None:
    """Refuse what would fail after the long work.

    Raises:
        ConfigError: The suffix is of no format that is drawn, the file can't be written, or
            matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"--plot {path}: no picture format by that suffix",
            fix=f"end the name with {', '.join(SUFFIXES)}",
            path=path,
        )
    if why := _why_unwritable(path):
        raise ConfigError(f"--plot {path}: can't be written", why=why, path=path)
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed",
            fix="pip install 'vllm-rvec[plot]', or pip install matplotlib",
        )


def save_heatmap(statistics: Statistics, title: str, path: Path) -> None:
    """Draw a vector's numbers by layer and kind of module.

    Args:
        statistics: The numbers. What is not known for any tensor gets no heat map.
        title: What the vector is called; anybody's text.
        path: As `check_plot` lets it pass. A file there is overwritten.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional, and half a second

    grid = make_grid(statistics, MAX_ROWS, MAX_KINDS)
    total = statistics.total()
    panels = [panel for panel in PANELS if panel.value(total) is not None] or [PANELS[0]]
    height = 2.6 + min(12.0, max(2.4, 0.2 * len(grid.rows)))
    width = 1.6 + max(3.6, 0.55 * len(grid.kinds))
    figure = Figure(figsize=(width * len(panels), height), layout="constrained")
    ratios = [max(6, len(grid.rows)), max(1.0, len(grid.rows) / 24)]
    axes = figure.subplots(2, len(panels), squeeze=False, height_ratios=ratios)
    for panel, (upper, lower) in zip(panels, axes.T, strict=True):
        _draw_panel(figure, upper, lower, panel, grid)
    # Not as mathematics: what looks like it in a name would be typeset, or fail.
    figure.suptitle(_title(title, total), parse_math=False, fontsize=12)
    _save(figure, path)


def _draw_panel(figure: Any, upper: Any, lower: Any, panel: _Panel, grid: Grid) -> None:
    inner = {key: _percent(panel.value(sums)) for key, sums in grid.cells.items()}
    outer = {kind: _percent(panel.value(sums)) for kind, sums in grid.outside.items()}
    scale = _scale(panel, [*grid.cells.values(), *grid.outside.values()])
    rows = [[inner.get((n, kind), math.nan) for kind in grid.kinds] for n in range(len(grid.rows))]
    image = _draw_cells(upper, rows, grid.kinds, panel, scale)
    step = math.ceil(len(grid.rows) / MAX_TICKS) or 1
    upper.set_yticks(range(0, len(grid.rows), step), grid.rows[::step], fontsize=8)
    upper.set_ylabel("layer")
    upper.set_title(panel.title, fontsize=11)
    _draw_cells(lower, [list(outer.values())], tuple(outer), panel, scale)
    lower.set_yticks([0], ["no layer"], fontsize=8)
    for place, value in enumerate(outer.values()):
        _write_value(lower, place, value, image)
    bar = figure.colorbar(
        image, ax=[upper, lower], label=panel.unit, fraction=0.05, pad=0.02, extend=panel.extend
    )
    if panel.is_logarithmic:
        # Even steps, whatever the range: a log scale's own ticks are a decade apart.
        ticks = [scale.vmin * (scale.vmax / scale.vmin) ** (step / 5) for step in range(6)]
        bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
        bar.minorticks_off()


def _draw_cells(
    axes: Any, rows: list[list[float]], kinds: tuple[str, ...], panel: _Panel, scale: Any
) -> Any:
    import numpy as np  # noqa: PLC0415 - for this picture only

    axes.set_facecolor("0.88")  # no tensor, or not known: NaN is not drawn
    shown = np.full((max(1, len(rows)), max(1, len(kinds))), math.nan)
    if rows and kinds:
        shown[:] = rows
    if panel.is_logarithmic:
        shown[shown <= 0] = scale.vmin
    image = axes.imshow(
        shown, cmap=panel.colours, norm=scale, aspect="auto", interpolation="nearest"
    )
    labels = [printable(kind, 16) for kind in kinds]
    axes.set_xticks(
        range(len(kinds)), labels, parse_math=False, fontsize=8, rotation=45, ha="right",
        rotation_mode="anchor",
    )  # fmt: skip
    return image


def _write_value(axes: Any, place: int, value: float, image: Any) -> None:
    if math.isnan(value):
        return
    red, green, blue, _ = image.cmap(image.norm(value))
    is_bright = 0.3 * red + 0.6 * green + 0.1 * blue > 0.5
    colour = "black" if is_bright else "white"
    axes.text(place, 0, f"{value:.2g}", ha="center", va="center", fontsize=8, color=colour)


def _scale(panel: _Panel, sums: "Sequence[Sums]") -> Any:
    from matplotlib.colors import LogNorm, Normalize  # noqa: PLC0415 - optional

    if not panel.is_logarithmic:
        return Normalize(
            0, 100 * max((panel.value(item) or 0.0 for item in sums), default=1.0) or 1.0
        )
    bounds = typical_range((panel.value(item), item.weights) for item in sums)
    low, high = (min(max(100 * bound, 1 / LARGEST), LARGEST) for bound in bounds)
    # One colour for one value would leave the scale without an extent.
    return LogNorm(low, high, clip=True) if low < high else LogNorm(high / 2, high * 2, clip=True)


def _percent(share: float | None) -> float:
    return math.nan if share is None else min(share * 100, LARGEST)


def _title(title: str, total: Sums) -> str:
    relative, changed = _percent(total.relative_norm), _percent(total.changed_share)
    told = [f"{total.weights:,} weights"]
    told += [] if math.isnan(relative) else [f"relative norm {relative:.3g} %"]
    told += [] if math.isnan(changed) else [f"{changed:.3g} % changed"]
    return f"vector {printable(title, 60)}\n{', '.join(told)}"


def _save(figure: Any, path: Path) -> None:
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that the font does not have is drawn as boxes; no more is to be said.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(drawn, format=path.suffix.lower()[1:], dpi=130)
    # Aside first: a full disk leaves no half of a picture, and the one before as it was.
    aside = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    try:
        aside.write_bytes(drawn.getvalue())
        aside.replace(path)
    except OSError as exc:
        aside.unlink(missing_ok=True)
        why = exc.strerror or str(exc)
        raise ConfigError(f"--plot {path}: can't be written", why=why, path=path) from exc


def _why_unwritable(path: Path) -> str:
    try:
        if path.is_dir():
            return "it is a folder"
        if not path.parent.is_dir():
            return f"there is no folder {path.parent}"
        path.stat()
    except FileNotFoundError:
        return "" if os.access(path.parent, os.W_OK) else "no permission to write in its folder"
    except (OSError, ValueError) as exc:  # too long a name, a NUL in it
        return str(exc)
    return "" if os.access(path, os.W_OK) else "no permission to write it"
