"""Whether a target descends from the pretrained initialisation of a vector's donors.

The manifest's sketch holds a fixed sample of the base donor's weights; the same sample of a target
tells how far it is from the base, without the base at hand. Imports no torch.

Two numbers, each the mean over tensors, so that no tensor counts for more than another however
large its weights are. With b and t the 64 weights of one tensor of base and target:

    distance     root mean square of ||t - b|| / ||b||, each counted as 2 at most
    correlation  mean of Pearson's r of b and t

0 and 1 for the base itself; sqrt(2) and 0, within 1 / (8 sqrt(tensors)), for weights drawn anew.
"""

from __future__ import annotations

import base64
import math
from typing import TYPE_CHECKING, Final

import blake3
import numpy as np

from vllm_rvec.vector.compatibility.report import Finding, Level, passed, refused, warned
from vllm_rvec.vector.manifest import SKETCH_SAMPLES, Sketch
from vllm_rvec.vector.names import by_plain_name, is_vocabulary, plain_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import numpy.typing as npt

    from vllm_rvec.vector.manifest import Manifest

__all__ = ["LineageProbe", "make_sketch", "sample_positions", "sketched_names"]

MAX_SKETCHED = 512
"""Tensors in a sketch: 32,768 weights tell one initialisation from another beyond any doubt."""

PASS_CORRELATION: Final = 0.9
PASS_DISTANCE: Final = 0.5
REFUSE_CORRELATION: Final = 0.5
REFUSE_DISTANCE: Final = 1.0
"""Where the verdicts part; `python -m benchmarks.lineage` measures families on both sides again.
Of families made there, targets of the same initialisation gave a correlation of at least 0.96 and a
distance of at most 0.30 (tuned, or with noise of 0.3 of each tensor), targets of another at most
0.04 and at least 1.09. Refused is what is as far from the base as the base is from zero. What lies
between (0.69 to 0.86) was retrained at pretraining's own rate, or is half of another model: the
vector may well not help."""

MIN_TENSORS: Final = 4
"""With fewer tensors (256 weights) chance alone moves the correlation by more than 0.06: nothing
is refused by so little."""

MAX_TENSOR_DISTANCE: Final = 2.0
SHOWN_TENSORS = 3


def sample_positions(name: str, elements: int) -> npt.NDArray[np.int64]:
    """Return the flat positions of a tensor's sample, as FORMAT.md says.

    Args:
        name: The tensor's name in the vector.
        elements: How many elements it has.

    Returns:
        64 positions, int64; some may be the same.
    """
    hasher = blake3.blake3(b"rvec sketch 1\0" + name.encode())
    numbers = np.frombuffer(hasher.digest(length=8 * SKETCH_SAMPLES), dtype="<u8")
    return (numbers % np.uint64(elements)).astype(np.int64)


def sketched_names(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Choose the tensors that a sketch holds.

    Args:
        shapes: The floating-point tensors, by their names in the vector.
    """
    names = sorted(
        name
        for name, shape in shapes.items()
        if len(shape) > 1 and 0 not in shape and not is_vocabulary(name)
    )
    return _spread(names, MAX_SKETCHED)


def make_sketch(
    shapes: Mapping[str, tuple[int, ...]],
    sample: Callable[[str, npt.NDArray[np.int64]], npt.NDArray[np.float32]],
) -> Sketch:
    """Take a sample of a checkpoint's weights.

    Args:
        shapes: Its floating-point tensors, by their names in the vector.
        sample: Gives a tensor's float32 values at flat positions.
    """
    tensors = {}
    for name in sketched_names(shapes):
        values = sample(name, sample_positions(name, math.prod(shapes[name]))).astype("<f4")
        tensors[name] = base64.b64encode(values.tobytes()).decode()
    return Sketch(tensors=tensors)


class LineageProbe:
    """A target's weights beside those of a vector's sketch: asked for, collected, compared.

    Args:
        manifest: The vector's manifest.
        most: How many of the sketch's tensors to use, evenly spread; all where None.
    """

    def __init__(self, manifest: Manifest, most: int | None = None) -> None:
        self._manifest = manifest
        self._sketch = manifest.sketch
        names = sorted(() if self._sketch is None else self._sketch.tensors)
        self._names = frozenset(_spread(names, len(names) if most is None else most))
        self._plain = by_plain_name(self._names)
        self._collected: dict[str, npt.NDArray[np.float32]] = {}

    def positions(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.int64] | None:
        """Return where a target's tensor is to be sampled.

        Args:
            name: The target's tensor.
            shape: Its shape.

        Returns:
            64 flat positions; None where the sketch does not hold the tensor, or not in this shape.
        """
        sketched = self._sketched_as(name)
        if sketched is None or 0 in shape:
            return None
        entry = self._manifest.tensors.get(sketched)
        if entry is not None and entry.shape != shape:
            return None
        return sample_positions(sketched, math.prod(shape))

    def add(self, name: str, values: npt.NDArray[np.float32]) -> None:
        """Take a target's 64 weights at the positions of one of its tensors."""
        if (sketched := self._sketched_as(name)) is not None:
            self._collected[sketched] = values

    def level(self) -> Level:
        """Compare what was collected with the sketch.

        Returns:
            pass, warn or refuse by the thresholds of this module; warn where there is too little
            to compare.
        """
        if self._sketch is None:
            return _unknown("the vector's manifest has no sketch of its base donor")
        if not self._collected:
            return _unknown("the target has none of the tensors in the vector's sketch")
        names = sorted(self._collected)
        base = np.array([np.frombuffer(self._sketch.packed_samples(n), "<f4") for n in names])
        target = np.array([self._collected[n] for n in names])
        return _compared(names, base.astype(np.float64), target.astype(np.float64))

    def _sketched_as(self, name: str) -> str | None:
        return name if name in self._names else self._plain.get(plain_name(name))


def _spread(names: list[str], most: int) -> list[str]:
    """Choose names evenly."""
    if len(names) <= most:
        return names
    return [names[i * len(names) // most] for i in range(most)]


def _compared(
    names: list[str], base: npt.NDArray[np.float64], target: npt.NDArray[np.float64]
) -> Level:
    """Compare samples `[tensors, 64]`."""
    for side, whose in ((base, "the vector's sketch"), (target, "the target")):
        if bad := [n for n, row in zip(names, side, strict=True) if not np.isfinite(row).all()]:
            found = refused(f"{whose} holds NaN or infinity in {len(bad)} tensors, as in {bad[0]}")
            return Level("lineage", "weights that are not finite", (found,), _numbers())
    varied = np.ptp(base, axis=1) > 0  # constant tensors are what any initialisation has
    if not varied.any():
        return _unknown("every tensor in the vector's sketch is constant")
    kept = [n for n, is_varied in zip(names, varied, strict=True) if is_varied]
    distances, correlations = _by_tensor(base[varied], target[varied])
    distance = float(np.sqrt(np.mean(np.minimum(distances, MAX_TENSOR_DISTANCE) ** 2)))
    correlation = float(np.mean(correlations))
    summary = f"relative distance {distance:.4f}, correlation {correlation:.4f}"
    if len(kept) < MIN_TENSORS:
        few = warned(f"{summary}, from too few tensors to tell: {len(kept)}")
        return Level("lineage", summary, (few,), _numbers(distance, correlation, len(kept)))
    evidence = _evidence(distance, correlation, len(kept))
    strays = _strays(kept, distances, correlations)
    return Level(
        "lineage", summary, (evidence, *strays), _numbers(distance, correlation, len(kept))
    )


def _by_tensor(
    base: npt.NDArray[np.float64], target: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return each tensor's relative distance and correlation; 0 for a constant target."""
    distances = np.linalg.norm(target - base, axis=1) / np.linalg.norm(base, axis=1)
    b = base - base.mean(axis=1, keepdims=True)
    t = target - target.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(b, axis=1) * np.linalg.norm(t, axis=1)
    products = np.einsum("ij,ij->i", b, t)
    return distances, np.divide(products, norms, out=np.zeros(len(b)), where=norms > 0)


def _evidence(distance: float, correlation: float, tensors: int) -> Finding:
    numbers = (
        f"relative distance to the base donor {distance:.4f}, correlation {correlation:.4f} "
        f"({SKETCH_SAMPLES} weights of {tensors} tensors)"
    )
    if correlation < REFUSE_CORRELATION or distance > REFUSE_DISTANCE:
        return refused(f"another pretrained initialisation: {numbers}")
    if correlation < PASS_CORRELATION or distance > PASS_DISTANCE:
        return warned(f"far from the base donor, though of its initialisation: {numbers}")
    return passed(f"the donors' pretrained initialisation: {numbers}")


def _strays(
    names: list[str],
    distances: npt.NDArray[np.float64],
    correlations: npt.NDArray[np.float64],
) -> Iterator[Finding]:
    """Point out single tensors that look like another model's."""
    stray = np.flatnonzero(correlations < REFUSE_CORRELATION)
    if len(stray) in {0, len(names)}:
        return
    lowest = stray[np.argsort(correlations[stray])][:SHOWN_TENSORS]
    shown = ", ".join(
        f"{names[i]} (distance {distances[i]:.2f}, correlation {correlations[i]:.2f})"
        for i in lowest
    )
    yield warned(f"{len(stray)} of {len(names)} tensors look like another model's: {shown}")


def _unknown(why: str) -> Level:
    return Level("lineage", "not compared", (warned(f"weights are not compared: {why}"),))


def _numbers(
    distance: float | None = None, correlation: float | None = None, tensors: int | None = None
) -> dict[str, float | int | None]:
    return {"distance": distance, "correlation": correlation, "sketched_tensors": tensors}
