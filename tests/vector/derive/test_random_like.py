"""vllm_rvec.vector.derive.random_like: as large as the vector, and random."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.support.vectors import decoded, random_tensor, store_vector
from vllm_rvec.errors import ConfigError
from vllm_rvec.vector.derive import random_like as drawing
from vllm_rvec.vector.derive.random_like import random_like

if TYPE_CHECKING:
    from pathlib import Path


def relative_deviation(one: torch.Tensor, other: torch.Tensor) -> float:
    return abs(float(one.double().norm()) / float(other.double().norm()) - 1)


def test_every_tensor_has_the_norm_of_the_original(vector: Path, tmp_path: Path) -> None:
    """Within 2^-24: one rounding of each element."""
    random_like(vector, tmp_path / "w", seed=0)
    found, before = decoded(tmp_path / "w"), decoded(vector)
    assert found.keys() == before.keys()
    for name, v in found.items():
        assert v.shape == before[name].shape
        assert v.dtype == torch.float32
        assert relative_deviation(v, before[name]) <= 2**-24


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_narrow_tensors_have_the_norm_as_nearly_as_their_dtype_lets_them(
    tmp_path: Path, dtype: torch.dtype, bound: float
) -> None:
    """As it is stored, not as it was before it was rounded."""
    tensors = {
        str(n): random_tensor(n, seed=n, dtype=dtype).mul_(100) for n in (1, 2, 5, 100, 1000, 50000)
    }
    v = store_vector(tmp_path / "v", tensors)
    random_like(v, tmp_path / "w", seed=0)
    for name, stored in decoded(tmp_path / "w").items():
        assert stored.dtype == dtype
        allowed = 1e-4 if stored.numel() >= 1000 else bound
        assert relative_deviation(stored, tensors[name]) <= allowed


def test_another_dtype_has_the_same_norm(vector: Path, tmp_path: Path) -> None:
    """It is what is stored that is fitted."""
    random_like(vector, tmp_path / "w", seed=0, dtype="bfloat16")
    before = decoded(vector)
    for name, v in decoded(tmp_path / "w").items():
        assert v.dtype == torch.bfloat16
        assert relative_deviation(v, before[name]) <= (1e-4 if v.numel() >= 1000 else 2**-8)


def test_numbers_are_normal_and_independent_of_the_vector(tmp_path: Path) -> None:
    """Mean, kurtosis, and correlation with the original, within four standard errors."""
    before = random_tensor(200, 500).exp()  # anything but normal
    v = store_vector(tmp_path / "v", {"w": before})
    random_like(v, tmp_path / "w", seed=0)
    z = decoded(tmp_path / "w")["w"].double().flatten()
    z /= z.std()
    error = z.numel() ** -0.5
    assert abs(z.mean()) < 4 * error
    assert abs((z**4).mean() - 3) < 4 * 96**0.5 * error
    both = torch.stack((z, before.double().flatten()))
    assert abs(torch.corrcoef(both)[0, 1]) < 4 * error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_permutation_has_the_same_values_at_other_places(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Every value as often as before, so the same norm; hardly one where it was."""
    before = random_tensor(60, 50, dtype=dtype)
    v = store_vector(tmp_path / "v", {"w": before})
    random_like(v, tmp_path / "w", seed=0, permute=True)
    found = decoded(tmp_path / "w")["w"]
    assert torch.equal(found.flatten().sort().values, before.flatten().sort().values)
    assert (found == before).float().mean() < 0.05


def test_a_permuted_sparse_vector_stays_sparse(tmp_path: Path) -> None:
    """It is as small as the original; the Gaussian control of the same vector is dense."""
    sparse = torch.zeros(100, 100)
    sparse[:3] = random_tensor(3, 100)
    v = store_vector(tmp_path / "v", {"w": sparse})
    permuted = random_like(v, tmp_path / "p", seed=0, permute=True)
    gaussian = random_like(v, tmp_path / "g", seed=0)
    assert permuted.manifest.tensors["w"].encoding == "sparse"
    assert gaussian.manifest.tensors["w"].encoding == "dense"
    assert gaussian.manifest.tensors["w"].changed == 10000


@pytest.mark.parametrize("permute", [False, True])
def test_a_seed_gives_one_vector(
    tmp_path: Path, permute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the same, whatever the order of tensors, what else there is, and blocks."""
    tensors = {f"w{i}": random_tensor(40, 40, seed=i) for i in range(4)}
    one = store_vector(tmp_path / "one", tensors)
    other = store_vector(tmp_path / "other", {"w3": tensors["w3"], "w0": tensors["w0"]})
    random_like(one, tmp_path / "1", seed=3, permute=permute)
    random_like(one, tmp_path / "2", seed=4, permute=permute)
    monkeypatch.setattr(drawing, "BLOCK_ELEMENTS", 100)
    random_like(other, tmp_path / "3", seed=3, permute=permute)
    first, second, third = (decoded(tmp_path / name) for name in "123")
    for name, v in third.items():
        assert torch.equal(v, first[name])
        assert not torch.equal(v, second[name])
    assert not torch.equal(third["w0"], third["w3"])


def test_numbers_are_those_that_were_written_down(tmp_path: Path) -> None:
    """Another machine, or another numpy, that gives others breaks a promise."""
    v = store_vector(tmp_path / "v", {"w": torch.tensor([1.0, 1.0, 1.0, 1.0])})
    random_like(v, tmp_path / "g", seed=1, dtype="float32")
    assert decoded(tmp_path / "g")["w"].tolist() == pytest.approx(GAUSSIAN, rel=1e-6)
    v = store_vector(tmp_path / "u", {"w": torch.arange(1.0, 9.0)})
    random_like(v, tmp_path / "p", seed=1, permute=True)
    assert decoded(tmp_path / "p")["w"].tolist() == PERMUTED


GAUSSIAN = [1.58932364, 0.70348072, -0.41128454, 0.90000576]
PERMUTED = [7.0, 4.0, 3.0, 6.0, 2.0, 8.0, 1.0, 5.0]


def test_the_lineage_says_what_kind_and_which_seed(vector: Path, tmp_path: Path) -> None:
    """A control must not be taken for the real one."""
    made = random_like(vector, tmp_path / "w", seed=-5, permute=True)
    assert made.step.operation == "random-like"
    assert made.step.parameters == {"kind": "permutation", "seed": "-5"}


def test_a_lowrank_tensor_gets_a_full_rank_control(tmp_path: Path) -> None:
    """Of the norm of its product."""
    lowrank = random_tensor(2, 30), random_tensor(20, 2, seed=1), 3.0
    v = store_vector(tmp_path / "v", {"l": lowrank})
    made = random_like(v, tmp_path / "w", seed=0)
    found = decoded(tmp_path / "w")["l"]
    assert made.manifest.tensors["l"].encoding == "dense"
    assert relative_deviation(found, decoded(v)["l"]) <= 2**-24
    assert int(torch.linalg.matrix_rank(found)) == 20


def test_numbers_beyond_float16_are_refused(tmp_path: Path) -> None:
    """One large element of the original, spread as a Gaussian, or a dtype that is too narrow."""
    v = store_vector(tmp_path / "v", {"w": torch.full((4, 4), 1e5)})
    with pytest.raises(ConfigError, match="overflows"):
        random_like(v, tmp_path / "w", seed=0, dtype="float16")
