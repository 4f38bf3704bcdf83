"""vllm_rvec.loader with every architecture of tests/support/families.py: all parameters, all bits.

What the engines then answer is in tests/integration/test_families.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.support.checkpoints import make_merged, make_vector, tensors
from tests.support.families import KINDS, recast, write_shards
from tests.support.variations import made_dense
from vllm_rvec.vector.extract import extract
from vllm_rvec.vector.merge import merge
from vllm_rvec.vector.recipe import RecipeVector, tensor_alphas

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.checkpoints import Family
    from tests.support.vllm_model import Loaded

TABLE = Path(__file__).resolve().parents[2] / "vllm_rvec" / "loader" / "FAMILIES.md"


def load(model: Path, load_format: str = "auto", *, dtype: str = "auto", **extra: Any) -> Loaded:
    # vLLM takes seconds to import; tests that are deselected should not pay.
    from tests.support.vllm_model import load_parameters

    return load_parameters(model, load_format, dtype=dtype, **extra)


def assert_same(fused: Loaded, merged: Loaded) -> None:
    assert fused.parameters.keys() == merged.parameters.keys()
    for name, parameter in fused.parameters.items():
        other = merged.parameters[name]
        assert parameter.numel() > 0, f"{name} is empty: nothing to compare"
        assert parameter.dtype == other.dtype, name
        assert torch.equal(parameter.view(torch.uint8), other.view(torch.uint8)), name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not KINDS[kind].is_multimodal])
def test_every_tensor_of_a_language_model_is_of_a_kind_that_recipes_name(
    families: dict[str, Family], kind: str
) -> None:
    """None is left to `default`: not packed matrices, experts, biases, sinks."""
    names = tensors(families[kind].target).keys()
    there = {"head": 3} if any("lm_head" in n or "embed_out" in n for n in names) else {}
    said = {"attention": 1, "mlp": 2, "norms": 4, "embedding": 5, **there}
    found = tensor_alphas(RecipeVector.model_validate({"path": "v", "alpha": said}), names)
    assert found.keys() == names
    assert set(found.values()) == set(said.values())


@pytest.mark.parametrize("kind", ["phi3", "gemma2", "mixtral", "deepseek-v3", "gpt-oss"])
def test_a_recipe_is_fused_as_it_is_merged(
    families: dict[str, Family], kind: str, tmp_path: Path
) -> None:
    """Where vLLM packs, splits, shifts or stacks what has alphas of its own."""
    target = families[kind].target
    vector = make_vector(families[kind], tmp_path / "v")
    alpha = {"attention": [1, -0.5], "mlp": [0.2, 0.9], "norms": 0.6, "default": 0}
    said = {"path": str(vector), "alpha": alpha}
    recipe = [RecipeVector.model_validate(said)]
    merged = merge(target, [vector], tmp_path / "m", alphas=[0.3], recipe=recipe).output
    fused = load(target, "rvec", vectors=[said], alpha=0.3)
    assert_same(fused, load(merged))
    assert not all(torch.equal(p, q) for p, q in both(fused, load(target)))


def both(one: Loaded, other: Loaded) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return ((p, other.parameters[name]) for name, p in one.parameters.items())


@pytest.mark.parametrize("alpha", [0.3, -1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_equals_merged_bit_for_bit(
    families: dict[str, Family], kind: str, alpha: float, tmp_path: Path
) -> None:
    """Every parameter is fused, with the bits of a merge, and early only what the table says."""
    family = families[kind]
    vector = make_vector(family, tmp_path / "v")
    merged = load(make_merged(family.target, vector, alpha, tmp_path / "merged"))
    fused = load(family.target, "rvec", vector=str(vector), alpha=alpha)
    assert_same(fused, merged)
    target = load(family.target).parameters
    assert not [name for name, p in fused.parameters.items() if torch.equal(p, target[name])]
    assert fused.loader.stream.ledger.materialized.keys() == KINDS[kind].early


@pytest.mark.parametrize("kind", ["phi3", "qwen3-moe"])
def test_a_sparse_vector_is_fused_as_it_decodes(
    families: dict[str, Family], kind: str, tmp_path: Path
) -> None:
    """Packed attention and experts, from a vector that is decoded while loading."""
    family = families[kind]
    vector = extract(family.tuned, family.base, tmp_path / "v", encoding="sparse").output
    decoded = made_dense(vector, tmp_path / "dense")
    merged = load(make_merged(family.target, decoded, 0.3, tmp_path / "merged"))
    assert_same(load(family.target, "rvec", vector=str(vector), alpha=0.3), merged)


@pytest.mark.parametrize("kind", ["mixtral", "gpt-neox"])
def test_shards_may_hold_tensors_in_any_order(
    families: dict[str, Family], kind: str, tmp_path: Path
) -> None:
    """Experts before routers, halves of one packed matrix in different files."""
    family = families[kind]
    vector = make_vector(family, tmp_path / "v")
    merged = load(make_merged(family.target, vector, 0.3, tmp_path / "merged"))
    dealt = write_shards(family.target, tmp_path / "dealt", 3)
    assert_same(load(dealt, "rvec", vector=str(vector), alpha=0.3), merged)


@pytest.mark.parametrize(
    ("kind", "stored", "served"),
    [
        ("llama-biases", torch.float16, torch.float16),
        ("gemma3", torch.float32, torch.float32),
        ("olmo2", torch.float32, torch.bfloat16),
        ("qwen3-moe", torch.float16, torch.float32),
    ],
)
def test_a_checkpoint_of_another_dtype_is_rounded_once(
    families: dict[str, Family],
    kind: str,
    stored: torch.dtype,
    served: torch.dtype,
    tmp_path: Path,
) -> None:
    """The sum is that of a merge in the dtype that is served, whatever the checkpoint's is."""
    family = recast(families[kind], tmp_path, stored)
    vector, dtype = make_vector(family, tmp_path / "v"), str(served).removeprefix("torch.")
    merged = load(make_merged(family.target, vector, 0.3, tmp_path / "m", served), dtype=dtype)
    fused = load(family.target, "rvec", dtype=dtype, vector=str(vector), alpha=0.3)
    assert {parameter.dtype for parameter in fused.parameters.values()} == {served}
    assert_same(fused, merged)


def test_the_table_names_what_is_tested() -> None:
    """A line for each family, with the operations that make it slower."""
    lines = re.findall(r"^\| `([\w-]+)` \|(.*)\|$", TABLE.read_text(), re.MULTILINE)
    assert [name for name, _ in lines] == list(KINDS)
    for name, text in lines:
        assert set(re.findall(r"`(aten\.[\w.]+)`", text)) == KINDS[name].early
        assert f"`{KINDS[name].model_type}`" in text
