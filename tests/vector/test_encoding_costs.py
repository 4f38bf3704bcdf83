"""vllm_rvec.vector.encoding_costs: what encodings would take, without writing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from vllm_rvec.errors import VectorCorruptError
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.encoding_costs import CHOICES, encoding_costs, tensors_of
from vllm_rvec.vector.extract import extract

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family


def test_a_cost_is_what_extract_then_takes_and_loses(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """Bytes and error are those of a vector that is really written."""
    found = {cost.name: cost for cost in encoding_costs(tensors_of(VectorReader(vector)))}
    for name, encoding, dtype in (
        ("auto F32", "auto", "float32"),
        ("dense BF16", "dense", "bfloat16"),
        ("int8 F32", "int8", "float32"),
        ("lowrank 16 BF16", "lowrank", "bfloat16"),
    ):
        made = extract(family.tuned, family.base, tmp_path / name, dtype=dtype, encoding=encoding)
        table = VectorReader(made.output).table
        assert found[name].size_bytes == sum(info.size_bytes for info in table.values())
        assert found[name].error == pytest.approx(made.error, rel=1e-4)
        worst = max(made.manifest.tensors.values(), key=lambda e: e.error)
        assert found[name].worst == pytest.approx(worst.error, rel=1e-4)


def test_ratios_are_to_the_dense_tensors() -> None:
    """Half a dense float32 vector is a dense bf16 one; two changed weights are next to nothing."""
    tensor = torch.zeros(64, 64)
    tensor[3, 5] = tensor[60, 60] = 0.5
    found = {cost.name: cost for cost in encoding_costs([("w", tensor)])}
    assert len(found) == len(CHOICES)
    assert found["dense F32"].ratio("F32") == 1
    assert found["dense BF16"].ratio("F32") == 0.5
    assert found["dense F32"].ratio("BF16") == 2
    assert found["auto F32"].size_bytes < 32
    assert found["auto F32"].stored == {"sparse": 1}


def test_nan_is_said_by_tensor() -> None:
    """A damaged weight has no cost."""
    with pytest.raises(VectorCorruptError, match="can't be stored") as caught:
        encoding_costs([("w", torch.tensor([[1.0, float("nan")]]))])
    assert caught.value.tensor_name == "w"


def test_nothing_costs_nothing() -> None:
    """A vector of zeros only has no ratio and no error."""
    (cost, *_) = encoding_costs([])
    assert (cost.size_bytes, cost.error, cost.ratio("F32")) == (0, 0.0, None)
