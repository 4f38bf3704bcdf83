"""vllm_rvec.vector.compatibility.lineage: one initialisation passes, another is refused."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import numpy as np
import pytest

from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.compatibility import Verdict
from vllm_rvec.vector.compatibility.lineage import (
    MAX_SKETCHED,
    LineageProbe,
    make_sketch,
    sample_positions,
    sketched_names,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy.typing as npt

    from vllm_rvec.vector import Manifest
    from vllm_rvec.vector.compatibility import Level

SHAPES = {f"model.layers.{i}.mlp.up_proj.weight": (40, 30) for i in range(20)}
Weights = dict[str, "npt.NDArray[np.float32]"]


def weights(seed: int) -> Weights:
    """A model whose tensors differ in scale by a thousand."""
    random = np.random.default_rng(seed)
    return {
        name: (random.standard_normal(1200) * 10.0 ** (-(i % 4))).astype(np.float32)
        for i, name in enumerate(SHAPES)
    }


def sketched(manifest: Manifest, base: Weights) -> Manifest:
    sketch = make_sketch(SHAPES, lambda name, positions: base[name][positions])
    return manifest.model_copy(update={"sketch": sketch, "tensors": {}})


@pytest.fixture
def manifest(vector: Path) -> Manifest:
    """A manifest whose base donor is `weights(0)`."""
    return sketched(VectorReader(vector).manifest, weights(0))


def compare(
    manifest: Manifest, target: Weights, rename: Callable[[str], str] = lambda name: name
) -> Level:
    probe = LineageProbe(manifest)
    for name, values in target.items():
        positions = probe.positions(rename(name), SHAPES[name])
        if positions is not None:
            probe.add(rename(name), values[positions])
    return probe.level()


def moved(by: float) -> Weights:
    noise = weights(1)
    return {name: values + np.float32(by) * noise[name] for name, values in weights(0).items()}


def numbers(level: Level) -> tuple[float, float]:
    distance, correlation = level.numbers["distance"], level.numbers["correlation"]
    assert distance is not None
    assert correlation is not None
    assert f"{distance:.4f}" in level.findings[0].text
    assert f"{correlation:.4f}" in level.findings[0].text
    return distance, correlation


def test_the_base_itself_is_at_distance_zero(manifest: Manifest) -> None:
    """Correlation 1, pass; both numbers are shown."""
    level = compare(manifest, weights(0))
    assert numbers(level) == pytest.approx((0, 1))
    assert level.verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("by", "verdict"),
    [(0.01, Verdict.PASS), (0.3, Verdict.PASS), (0.7, Verdict.WARN), (2.0, Verdict.REFUSE)],
)
def test_the_further_from_the_base_the_worse(
    manifest: Manifest, by: float, verdict: Verdict
) -> None:
    """Noise of a share of each tensor's size is that distance, and 1 / sqrt(1 + by^2)."""
    level = compare(manifest, moved(by))
    assert level.verdict is verdict
    distance, correlation = numbers(level)
    assert distance == pytest.approx(min(by, 2), rel=0.1)
    assert correlation == pytest.approx(1 / (1 + by**2) ** 0.5, abs=0.03)


def test_another_initialisation_is_refused(manifest: Manifest) -> None:
    """Correlation 0 within chance, distance sqrt(2)."""
    level = compare(manifest, weights(7))
    distance, correlation = numbers(level)
    assert level.verdict is Verdict.REFUSE
    assert distance == pytest.approx(2**0.5, rel=0.15)
    assert abs(correlation) < 0.1


def test_no_large_tensor_drowns_the_others(manifest: Manifest) -> None:
    """The one tensor that is right has weights a million times as large as the others."""
    target = weights(7)
    first = next(iter(target))
    base = weights(0)
    base[first] *= 1e6
    target[first] = base[first]
    assert compare(sketched(manifest, base), target).verdict is Verdict.REFUSE


def test_no_small_tensor_drowns_the_others(manifest: Manifest) -> None:
    """A tensor that was nearly zero at first has moved by many times its size: a warning names it.

    The others speak for the target.
    """
    base, target = weights(0), moved(0.01)
    first = next(iter(base))
    base[first] = base[first] * np.float32(1e-9)
    level = compare(sketched(manifest, base), target | {first: weights(7)[first]})
    assert level.verdict is Verdict.WARN
    assert level.findings[0].verdict is Verdict.PASS
    assert level.findings[1].text.startswith(f"1 of 20 tensors look like another model's: {first}")


def test_a_target_of_two_models_is_no_pass(manifest: Manifest) -> None:
    """A quarter of the layers from elsewhere warns, three quarters are refused."""
    mine, other = moved(0.01), weights(7)
    for count, verdict in ((5, Verdict.WARN), (15, Verdict.REFUSE)):
        spliced = mine | dict(list(other.items())[:count])
        assert compare(manifest, spliced).verdict is verdict


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["sketch", "target"])
def test_a_weight_that_is_not_finite_is_refused(
    manifest: Manifest, side: str, value: float
) -> None:
    """Every comparison with NaN is false: it must not look like agreement."""
    spoilt = weights(0)
    spoilt[next(iter(spoilt))][:] = value
    if side == "sketch":
        level = compare(sketched(manifest, spoilt), weights(0))
    else:
        level = compare(manifest, spoilt)
    assert level.verdict is Verdict.REFUSE
    assert "NaN or infinity in 1 tensors" in level.findings[0].text
    assert ("sketch" if side == "sketch" else "target") in level.findings[0].text


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_target_of_constants_is_refused(manifest: Manifest, value: float) -> None:
    """Zeros, ones: a checkpoint that was never filled."""
    empty = {name: np.full(1200, value, np.float32) for name in SHAPES}
    level = compare(manifest, empty)
    assert level.verdict is Verdict.REFUSE
    assert level.numbers["correlation"] == 0


def test_constant_tensors_of_the_base_tell_nothing(manifest: Manifest) -> None:
    """Norms begin as ones in every model: they are left out."""
    constant = {name: np.ones(1200, np.float32) for name in SHAPES}
    level = compare(sketched(manifest, constant), constant)
    assert level.verdict is Verdict.WARN
    some = weights(0) | dict(list(constant.items())[:5])
    assert compare(sketched(manifest, some), some).numbers["sketched_tensors"] == 15


def test_a_vector_without_a_sketch_is_a_warning(manifest: Manifest) -> None:
    """Nothing is compared, and it says so."""
    level = compare(manifest.model_copy(update={"sketch": None}), weights(0))
    assert level.verdict is Verdict.WARN
    assert "no sketch" in level.findings[0].text


def test_a_target_with_none_of_the_sketched_tensors_is_a_warning(manifest: Manifest) -> None:
    """Whether it fits at all is the structure's business."""
    level = compare(manifest, weights(0), lambda name: "other." + name)
    assert level.verdict is Verdict.WARN


def test_too_few_tensors_refuse_nothing(manifest: Manifest) -> None:
    """Three tensors are 192 weights: chance is too large a part."""
    level = compare(manifest, dict(list(weights(7).items())[:3]))
    assert level.verdict is Verdict.WARN
    numbers(level)


def test_a_part_of_the_sketch_is_spread_over_the_whole(manifest: Manifest) -> None:
    """A load looks at some tensors: every part of the model has its share."""
    probe = LineageProbe(manifest, 4)
    asked = [name for name in sorted(SHAPES) if probe.positions(name, SHAPES[name]) is not None]
    assert [sorted(SHAPES).index(name) for name in asked] == [0, 5, 10, 15]
    for name in asked:
        probe.add(name, weights(7)[name][sample_positions(name, 1200)])
    assert probe.level().verdict is Verdict.REFUSE


def test_a_prefix_on_one_side_changes_nothing(manifest: Manifest) -> None:
    """The sketch's positions go by the vector's names."""
    level = compare(manifest, weights(0), lambda name: name.removeprefix("model."))
    assert (level.verdict, level.numbers["distance"]) == (Verdict.PASS, 0.0)


def test_another_shape_is_not_sampled(vector: Path) -> None:
    """Positions would mean other weights."""
    manifest = VectorReader(vector).manifest
    assert manifest.sketch is not None
    probe, name = LineageProbe(manifest), next(iter(manifest.sketch.tensors))
    shape = manifest.tensors[name].shape
    assert probe.positions(name, shape) is not None
    assert probe.positions(name, (shape[1], shape[0])) is None or shape[0] == shape[1]
    assert probe.positions(name, (0, 4)) is None
    assert probe.positions("model.norm.weight", (64,)) is None


def test_positions_are_those_that_format_md_names() -> None:
    """Pinned: an old vector's sketch must mean the same weights for ever."""
    assert sample_positions("model.layers.0.mlp.up_proj.weight", 8192)[:4].tolist() == PINNED
    assert sample_positions("x", 1).tolist() == [0] * 64


PINNED = [3570, 6816, 4335, 7145]


def test_a_sketch_has_matrices_only_and_at_most_512() -> None:
    """No vector, no row per token; spread evenly over many."""
    shapes: dict[str, tuple[int, ...]] = {f"m{i:04}.weight": (2, 2) for i in range(1000)}
    shapes |= {"bias": (2,), "model.embed_tokens.weight": (9, 2), "lm_head.weight": (9, 2)}
    names = sketched_names(shapes | {"empty": (0, 2)})
    assert len(names) == MAX_SKETCHED
    assert names[0] == "m0000.weight"
    assert names[-1] == "m0998.weight"
    assert len(set(names)) == len(names)


def test_a_sketch_holds_the_bases_weights(manifest: Manifest) -> None:
    """64 little-endian float32 a tensor."""
    assert manifest.sketch is not None
    for name, text in manifest.sketch.tensors.items():
        stored = np.frombuffer(base64.b64decode(text), "<f4")
        assert np.array_equal(stored, weights(0)[name][sample_positions(name, 1200)])
