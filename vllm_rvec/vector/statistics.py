"""What a vector looks like in numbers: by tensor, by layer, by kind of module.

All of it but the spectra stands in the manifest and needs no tensor's data. Several tensors are
summed up by sums of squares and of counts, never by averages of ratios. Imports no torch; the
spectra are computed in `spectrum`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from vllm_rvec.vector.layout import part_names
from vllm_rvec.vector.module_names import KINDS, Place, place_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping

    from vllm_rvec.vector.manifest import Manifest, TensorEntry
    from vllm_rvec.vector.reader import VectorReader

__all__ = [
    "ENERGY_RANKS",
    "OTHERS",
    "TOP",
    "Grid",
    "LossyError",
    "Spectrum",
    "Statistics",
    "Stored",
    "Sums",
    "finite_ratio",
    "has_spectrum",
    "lossy_error",
    "make_grid",
    "stored_as",
    "typical_range",
]

K = TypeVar("K", bound="Hashable")

TOP: Final = 64
"""How many singular values of a matrix are kept."""
ENERGY_RANKS: Final = (1, 16, 64)
"""The numbers of top singular values whose energy is shown."""
ENERGY_SHARE: Final = 0.9
"""The share of the energy that `Sums.rank` asks for."""

RANGE_MARGIN = 0.005
"""Share of the weights that may be outside a typical range, on either side."""

OTHERS = "others"
"""The column of a grid for kinds that have none of their own."""


class Spectrum(NamedTuple):
    """The largest singular values of a matrix, or of a stack of matrices, squared."""

    squares: tuple[float, ...]
    """In falling order, at most `TOP`; of a stack, the sums over its matrices."""
    total: float
    """The squared Frobenius norm: the sum over all singular values."""


@dataclass(slots=True)
class Sums:
    """What adds up over any number of tensors."""

    tensors: int = 0
    weights: int = 0
    norm: float = 0.0
    """Frobenius norm of all of them together, as stored."""
    compared_norm: float = 0.0
    """The same of those whose base norm is known."""
    base_norm: float = 0.0
    """Frobenius norm of the base donor's tensors, of those."""
    changed: int = 0
    is_counted: bool = True
    """Whether the changed weights of every tensor are known: of factors they are not."""
    squares: list[float] = field(default_factory=lambda: [0.0] * TOP)
    """Summed squares of the largest singular values: of all first ones, all second ones, ..."""
    energy: float = 0.0
    """Squared Frobenius norm of the tensors whose singular values are known."""

    def add(self, entry: TensorEntry, spectrum: Spectrum | None = None) -> None:
        """Take one tensor into account."""
        self.tensors += 1
        self.weights += entry.elements
        # hypot: a square may overflow or vanish though the norm does not.
        self.norm = math.hypot(self.norm, entry.norm)
        if entry.base_norm is not None:
            self.compared_norm = math.hypot(self.compared_norm, entry.norm)
            self.base_norm = math.hypot(self.base_norm, entry.base_norm)
        if entry.changed is None:
            self.is_counted = False
        else:
            self.changed += entry.changed
        if spectrum is not None:
            self.energy += spectrum.total
            for number, square in enumerate(spectrum.squares):
                self.squares[number] += square

    @property
    def relative_norm(self) -> float | None:
        """Norm over the base donor's; None where no base norm is known, or it is zero."""
        return finite_ratio(self.compared_norm, self.base_norm)

    @property
    def changed_share(self) -> float | None:
        """Share of weights that differ between the donors; None where any were not counted."""
        return finite_ratio(self.changed, self.weights) if self.is_counted else None

    def energy_share(self, rank: int) -> float | None:
        """Return the share of the energy in each matrix's `rank` largest singular values.

        Energy is the squared Frobenius norm: what is left of v, squared, if each matrix is
        replaced by its best approximation of that rank.

        Args:
            rank: At most `TOP`.

        Returns:
            None where no singular values are known, or all are zero.
        """
        return finite_ratio(math.fsum(self.squares[:rank]), self.energy)

    @property
    def rank(self) -> int | None:
        """The rank at which nine tenths of the energy are kept; None where it is above `TOP`."""
        ranks = range(1, TOP + 1)
        return next((r for r in ranks if (self.energy_share(r) or 0) >= ENERGY_SHARE), None)


class Statistics:
    """A vector's numbers, to be summed up in any way.

    Args:
        manifest: The vector's.
        spectra: Singular values by tensor, where they were computed.
    """

    def __init__(self, manifest: Manifest, spectra: Mapping[str, Spectrum] | None = None) -> None:
        self.entries = manifest.tensors
        self.spectra = spectra or {}
        self.places = {name: place_of(name) for name in manifest.tensors}

    def sums_by(self, key: Callable[[Place], K | None]) -> dict[K, Sums]:
        """Sum up all tensors whose places have one key; without those whose key is None."""
        found: dict[K, Sums] = defaultdict(Sums)
        for name, entry in self.entries.items():
            if (group := key(self.places[name])) is not None:
                found[group].add(entry, self.spectra.get(name))
        return dict(found)

    def total(self) -> Sums:
        """Sum up all tensors."""
        return self.sums_by(lambda _: "all").get("all", Sums())

    def by_kind(self, limit: int | None = None) -> dict[str, Sums]:
        """Sum up by kind of module, in the order in which a model applies them.

        Args:
            limit: Where there are more kinds, those with the fewest weights share `OTHERS`.
        """
        found = self.sums_by(lambda place: place.kind)
        if limit is not None and len(found) > limit:
            column = _columns(found, limit)
            found = self.sums_by(lambda place: column[place.kind])
        return _sorted(found)

    def of_tensor(self, name: str) -> Sums:
        """Give one tensor's numbers."""
        sums = Sums()
        sums.add(self.entries[name], self.spectra.get(name))
        return sums


@dataclass(frozen=True, slots=True)
class Grid:
    """Layers by kinds of module, small enough to be looked at; what is outside layers apart."""

    rows: tuple[str, ...]
    """The layers of each row: `7`, or `6-8` where several had to share it."""
    kinds: tuple[str, ...]
    """The columns."""
    cells: dict[tuple[int, str], Sums]
    """By row number and kind; where there is no tensor there is no cell."""
    by_row: dict[int, Sums]
    by_kind: dict[str, Sums]
    outside: dict[str, Sums]
    """Tensors without a layer, by kind."""


def make_grid(statistics: Statistics, max_rows: int, max_kinds: int) -> Grid:
    """Sum up by layer and kind.

    Args:
        statistics: The vector's numbers.
        max_rows: Where there are more layers, neighbours share a row.
        max_kinds: Where there are more kinds, those with the fewest weights share `OTHERS`.
    """
    layers = sorted({p.layer for p in statistics.places.values() if p.layer is not None})
    group = max(1, math.ceil(len(layers) / max_rows))
    row_of = {layer: number // group for number, layer in enumerate(layers)}
    column = _columns(statistics.sums_by(lambda p: None if p.layer is None else p.kind), max_kinds)
    outer = _columns(statistics.sums_by(lambda p: p.kind if p.layer is None else None), max_kinds)

    def cell(place: Place) -> tuple[int, str] | None:
        return None if place.layer is None else (row_of[place.layer], column[place.kind])

    def outside(place: Place) -> str | None:
        return outer[place.kind] if place.layer is None else None

    return Grid(
        rows=tuple(_label(layers[i : i + group]) for i in range(0, len(layers), group)),
        kinds=_in_order(set(column.values())),
        cells=statistics.sums_by(cell),
        by_row=statistics.sums_by(lambda p: None if p.layer is None else row_of[p.layer]),
        by_kind=statistics.sums_by(lambda p: None if p.layer is None else column[p.kind]),
        outside=_sorted(statistics.sums_by(outside)),
    )


class Stored(NamedTuple):
    """The tensors of one encoding and dtype."""

    encoding: str
    dtype: str
    tensors: int
    weights: int
    size_bytes: int
    """In the shards, without their headers."""


def stored_as(vector: VectorReader) -> list[Stored]:
    """Count tensors, weights and bytes by encoding and dtype, from headers alone."""
    found: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for name, entry in vector.manifest.tensors.items():
        # What a tensor of zeros would decode to is nobody's concern.
        counts = found[entry.encoding, "" if entry.encoding == "zero" else entry.dtype]
        counts[0] += 1
        counts[1] += entry.elements
        parts = part_names(name, entry, vector.table)
        counts[2] += sum(vector.table[part].size_bytes for part in parts)
    return [Stored(*key, *found[key]) for key in sorted(found)]


class LossyError(NamedTuple):
    """What the encodings lost, as relative Frobenius errors."""

    overall: float | None
    """Of all tensors together; None where it is not finite."""
    worst: float
    worst_tensor: str | None
    """None where every tensor is stored without loss."""


def lossy_error(manifest: Manifest) -> LossyError:
    """Sum up what the encodings lost.

    The manifest has each tensor's error and its norm as stored. The norm before is that of the
    stored tensor, but for lowrank, where what is kept and what is lost are orthogonal. A tensor
    that was rounded to zero as a whole has no norm any more, and counts in `worst` only.
    """
    lost = before = worst = 0.0
    worst_tensor = None
    for name, entry in manifest.tensors.items():
        norm = entry.norm
        if entry.encoding == "lowrank" and entry.error < 1:
            norm /= math.sqrt(1 - entry.error * entry.error)
        lost, before = math.hypot(lost, norm * entry.error), math.hypot(before, norm)
        if entry.error > worst:
            worst, worst_tensor = entry.error, name
    return LossyError(finite_ratio(lost, before) if before else 0.0, worst, worst_tensor)


def has_spectrum(entry: TensorEntry) -> bool:
    """Tell whether a tensor is a matrix with data, or a stack of them (experts in one tensor)."""
    return entry.encoding != "zero" and len(entry.shape) in {2, 3} and entry.elements > 0


def finite_ratio(part: float, whole: float) -> float | None:
    """Divide; None where that is no finite number."""
    ratio = part / whole if whole else math.nan
    return ratio if math.isfinite(ratio) else None


def typical_range(cells: Iterable[tuple[float | None, int]]) -> tuple[float, float]:
    """Find the range of values, above zero, that nearly all weights have: for scales of colour.

    Args:
        cells: Values with the weights that each stands for. The few weights of norms and biases,
            which often differ from the matrices by orders of magnitude, move no bound.
    """
    known = sorted((value, weights) for value, weights in cells if value)
    if not known:
        return 1.0, 1.0
    left_out = sum(weights for _, weights in known) * RANGE_MARGIN
    return _first_beyond(known, left_out), _first_beyond(known[::-1], left_out)


def _first_beyond(known: list[tuple[float, int]], left_out: float) -> float:
    passed = 0
    for value, weights in known:
        passed += weights
        if passed > left_out:
            return value
    return known[-1][0]


def _columns(weights: Mapping[str, Sums], limit: int) -> dict[str, str]:
    """Say in which column each kind goes."""
    largest = sorted(weights, key=lambda kind: (-weights[kind].weights, kind))
    kept = largest if len(largest) <= limit else largest[: limit - 1]
    return dict.fromkeys(largest, OTHERS) | {kind: kind for kind in kept}


def _in_order(kinds: Iterable[str]) -> tuple[str, ...]:
    rank = {kind: number for number, kind in enumerate(KINDS)} | {OTHERS: len(KINDS) + 1}
    return tuple(sorted(kinds, key=lambda kind: (rank.get(kind, len(KINDS)), kind)))


def _sorted(sums: Mapping[str, Sums]) -> dict[str, Sums]:
    return {kind: sums[kind] for kind in _in_order(sums)}


def _label(layers: list[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
