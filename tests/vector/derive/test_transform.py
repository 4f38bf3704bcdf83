"""vllm_rvec.vector.derive.transform: select, density, dare, rescale, in this order."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.support.vectors import decoded, random_tensor, store_vector
from vllm_rvec.arithmetic import fuse
from vllm_rvec.errors import ConfigError
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.derive.pruning import drop_randomly, keep_largest
from vllm_rvec.vector.derive.randomness import raw_numbers
from vllm_rvec.vector.derive.transform import transform

if TYPE_CHECKING:
    from pathlib import Path


def result(vector: Path, output: Path, **options: Any) -> dict[str, torch.Tensor]:
    transform(vector, output, **options)
    return decoded(output)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, v in one.items():
        assert torch.equal(v.float(), other[name].float())


def test_tensors_left_out_become_zero(vector: Path, tmp_path: Path) -> None:
    """The others stay bit for bit; the vector says as much of its donors as before."""
    before = decoded(vector)
    found = result(vector, tmp_path / "w", include=["*.mlp.*"], exclude=["*.layers.1.*"])
    assert_same(found, {n: v for n, v in before.items() if ".layers.0.mlp." in n})
    manifest = VectorReader(tmp_path / "w").manifest
    assert manifest.tensors.keys() == before.keys()
    assert manifest.complete
    assert manifest.lineage[-1].parameters == {"include": "*.mlp.*", "exclude": "*.layers.1.*"}


@pytest.mark.parametrize("density", [0.1, 0.333, 1.0, 1e-9])
def test_density_keeps_the_share_of_each_tensor_that_is_largest(
    vector: Path, tmp_path: Path, density: float
) -> None:
    """ceil(D n) of n elements, as they are."""
    found = result(vector, tmp_path / "w", density=density)
    for name, before in decoded(vector).items():
        count = math.ceil(Fraction(str(density)) * before.numel())
        assert torch.equal(found[name].float(), keep_largest(before, count))
        assert int(found[name].count_nonzero()) == min(count, int(before.count_nonzero()))


def test_density_is_the_decimal_number_that_was_written(tmp_path: Path) -> None:
    """0.07 of 100 elements are 7; in binary 0.07 * 100 is a little more."""
    assert math.ceil(0.07 * 100) == 8
    v = store_vector(tmp_path / "v", {"w": random_tensor(100)})
    assert int(result(v, tmp_path / "w", density=0.07)["w"].count_nonzero()) == 7


def test_dare_drops_by_seed_and_name(vector: Path, tmp_path: Path) -> None:
    """Each tensor by its own stream: the same twice, another with another seed."""
    found = result(vector, tmp_path / "1", dare=0.5, seed=1)
    assert_same(found, result(vector, tmp_path / "again", dare=0.5, seed=1))
    other = result(vector, tmp_path / "2", dare=0.5, seed=2)
    for name, before in decoded(vector).items():
        expected = drop_randomly(before, 0.5, raw_numbers(1, name, "dare"))
        assert torch.equal(found[name].float(), expected)
        if before.numel() > 16:
            assert not torch.equal(found[name].float(), other[name].float())


def test_a_result_does_not_depend_on_the_order_of_tensors(tmp_path: Path) -> None:
    """Nor on what else there is in the vector, nor on threads."""
    tensors = {f"w{i}": random_tensor(40, 40, seed=i) for i in range(4)}
    one = store_vector(tmp_path / "one", tensors)
    other = store_vector(tmp_path / "other", {"w3": tensors["w3"], "w0": tensors["w0"]})
    found = result(one, tmp_path / "1", dare=0.4, seed=3, density=0.5, rescale="norm")
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        again = result(other, tmp_path / "2", dare=0.4, seed=3, density=0.5, rescale="norm")
    finally:
        torch.set_num_threads(threads)
    assert_same({name: found[name] for name in again}, again)


def test_a_rescaled_vector_is_the_vector_with_that_alpha(
    vector: Path, family: Any, tmp_path: Path
) -> None:
    """The sum theta + 1 * (F * v) is theta + F * v, bit for bit."""
    found = result(vector, tmp_path / "w", rescale=0.3)
    for name, v in decoded(vector).items():
        theta = random_tensor(*v.shape, seed=5).bfloat16()
        alone, scaled = (torch.empty_like(theta) for _ in range(2))
        fuse(theta, v, 0.3, out=alone)
        fuse(theta, found[name], 1.0, out=scaled)
        assert torch.equal(alone, scaled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rescale_norm_restores_each_tensors_norm(tmp_path: Path, dtype: torch.dtype) -> None:
    """In float32, within its rounding."""
    v = store_vector(
        tmp_path / "v", {f"w{i}": random_tensor(50, 30, seed=i, dtype=dtype) for i in range(3)}
    )
    found = result(v, tmp_path / "w", density=0.3, dare=0.5, seed=0, rescale="norm")
    for name, before in decoded(v).items():
        ratio = found[name].double().norm() / before.double().norm()
        assert abs(ratio.item() - 1) < 2**-24
        assert int(found[name].count_nonzero()) < 450


def test_a_norm_of_nothing_can_not_be_restored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What was dropped as a whole stays zero, with a warning that names it."""
    v = store_vector(tmp_path / "v", {"small": random_tensor(1), "w": random_tensor(9, 9)})
    seed = next(
        s for s in range(99) if raw_numbers(s, "small", "dare").random_raw() % 2**32 < 2**31
    )
    found = result(v, tmp_path / "w", dare=0.5, seed=seed, rescale="norm")
    assert set(found) == {"w"}
    assert "small" in caplog.text


def test_operations_have_one_order(tmp_path: Path) -> None:
    """Density, then dare, then the factor, written out here."""
    before = random_tensor(40, 40)
    v = store_vector(tmp_path / "v", {"w": before})
    found = result(v, tmp_path / "w", rescale=3.7, dare=0.25, seed=9, density=0.5)["w"]
    largest = keep_largest(before, 800)
    expected = drop_randomly(largest, 0.25, raw_numbers(9, "w", "dare")) * float(np.float32(3.7))
    assert torch.equal(found, expected)


@pytest.fixture
def factored(tmp_path: Path) -> Path:
    """A vector with a lowrank and a dense tensor."""
    lowrank = random_tensor(3, 20), random_tensor(30, 3, seed=1), 2.0
    return store_vector(tmp_path / "factored", {"l": lowrank, "w": random_tensor(20, 20)})


def test_lowrank_tensors_stay_lowrank_where_they_are_multiplied_as_a_whole(
    factored: Path, tmp_path: Path
) -> None:
    """The same factors with another scaling; the norm goes along."""
    found = result(factored, tmp_path / "w", rescale=-0.5)
    before, after = VectorReader(factored), VectorReader(tmp_path / "w")
    entry = after.manifest.tensors["l"]
    assert (entry.encoding, entry.scaling) == ("lowrank", -1.0)
    assert torch.equal(after.part("l:lora_A"), before.part("l:lora_A"))
    assert entry.norm == pytest.approx(0.5 * before.manifest.tensors["l"].norm, rel=1e-6)
    assert torch.equal(found["l"], decoded(factored)["l"] * -0.5)
    assert not set(result(factored, tmp_path / "x", exclude=["l"])) - {"w"}


@pytest.mark.parametrize("options", [{"density": 0.5}, {"rescale": 0.5, "encoding": "dense"}])
def test_lowrank_tensors_are_decoded_where_they_have_to_be(
    factored: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """To thin them, or to store them otherwise."""
    found = result(factored, tmp_path / "w", **options)
    assert VectorReader(tmp_path / "w").manifest.tensors["l"].encoding in {"dense", "sparse"}
    before = decoded(factored)["l"]
    expected = keep_largest(before, 300) if "density" in options else before * 0.5
    assert torch.equal(found["l"], expected)


def test_a_lossy_tensor_that_is_not_touched_stays_as_it_is_stored(tmp_path: Path) -> None:
    """int8 is neither decoded to four times its size nor rounded again; its error is still told."""
    v = store_vector(tmp_path / "v", {"w": random_tensor(8, 64), "x": random_tensor(8, 64)})
    transform(v, tmp_path / "int8", exclude=["x"], encoding="int8")
    transform(tmp_path / "int8", tmp_path / "same", include=["w"])
    before, after = (VectorReader(tmp_path / n).manifest.tensors["w"] for n in ("int8", "same"))
    assert after.encoding == "int8"
    assert after.error == pytest.approx(before.error)
    assert after.changed == before.changed
    assert_same(decoded(tmp_path / "int8"), decoded(tmp_path / "same"))
    multiplied = result(tmp_path / "int8", tmp_path / "half", rescale=0.5)
    assert torch.equal(multiplied["w"], decoded(tmp_path / "int8")["w"] * 0.5)


def test_a_scaling_that_overflows_is_refused(tmp_path: Path) -> None:
    """For lowrank as for any other."""
    lowrank = torch.full((2, 4), 1e18), torch.full((4, 2), 1e18), 1.0
    v = store_vector(tmp_path / "v", {"l": lowrank})
    with pytest.raises(ConfigError, match="smaller factor"):
        transform(v, tmp_path / "w", rescale=1e5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to do"),
        ({"density": 0.0}, "--density 0.0"),
        ({"density": 1.5}, "--density 1.5"),
        ({"density": math.nan}, "--density nan"),
        ({"dare": 1.0, "seed": 0}, "--dare 1.0"),
        ({"dare": -0.1, "seed": 0}, "--dare -0.1"),
        ({"dare": 0.5}, "--dare needs --seed"),
        ({"density": 0.5, "seed": 1}, "--seed is of --dare only"),
        ({"rescale": "norm"}, "the norm stays as it is"),
        ({"rescale": math.inf}, "--rescale inf: is not finite"),
        ({"rescale": 0.0}, "leaves nothing"),
        ({"rescale": 1e39}, "beyond the range of float32"),
    ],
)
def test_what_makes_no_sense_is_refused(
    vector: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """With the option that is wrong, before anything is read."""
    with pytest.raises(ConfigError, match=message):
        transform(vector, tmp_path / "w", **options)
    assert not list(tmp_path.iterdir())


def test_all_that_is_wrong_is_said_at_once(vector: Path, tmp_path: Path) -> None:
    """One run to learn it."""
    with pytest.raises(ConfigError) as caught:
        transform(vector, tmp_path / "w", density=2, dare=1.0, rescale=math.nan)
    assert len(caught.value.problems) == 4


def test_a_pattern_without_a_tensor_is_refused(vector: Path, tmp_path: Path) -> None:
    """A mistyped name is no wish for a vector of zeros."""
    with pytest.raises(ConfigError, match=r"\*\.mpl\.\*: near are .*mlp"):
        transform(vector, tmp_path / "w", include=["*.mpl.*"])
