"""vllm_rvec.vector.compatibility: whether a vector belongs to a target."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vllm_rvec.checkpoint.table import read_config, read_table
from vllm_rvec.errors import IncompatibleVectorError
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.compatibility import check_architecture, check_tensors, part_for

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family
    from vllm_rvec.vector import Manifest


@pytest.fixture
def manifest(vector: Path) -> Manifest:
    return VectorReader(vector).manifest


@pytest.fixture
def shapes(family: Family) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in read_table(family.target).items()}


def test_a_target_of_the_family_is_accepted(
    manifest: Manifest, shapes: dict[str, tuple[int, ...]], family: Family
) -> None:
    """Same names, same shapes, same architecture."""
    check_architecture(manifest, read_config(family.target), target="t")
    check_tensors(manifest, shapes, target="t")


def test_every_mismatch_is_reported(manifest: Manifest, shapes: dict[str, tuple[int, ...]]) -> None:
    """Missing in the target, not covered by the vector, misshapen, quantized: all at once."""
    shapes.pop("model.norm.weight")
    shapes["model.layers.9.mlp.up_proj.weight"] = (1, 1)
    shapes["model.embed_tokens.weight"] = (1, 1)
    with pytest.raises(IncompatibleVectorError, match="4 tensors don't match") as caught:
        check_tensors(
            manifest,
            shapes,
            target="t",
            quantized=["model.layers.0.mlp.up_proj.weight"],
        )
    assert len(caught.value.problems) == 4
    assert "shape [512, 64] in the vector, [1, 1] in the target" in str(caught.value)


def test_a_tied_head_gets_the_embeddings_part(
    manifest: Manifest, shapes: dict[str, tuple[int, ...]]
) -> None:
    """Donors that are tied store no head: a target's stored head is covered all the same."""
    shapes["lm_head.weight"] = (512, 64)
    check_tensors(manifest, shapes, target="t")
    assert part_for(manifest, "lm_head.weight") == "model.embed_tokens.weight"
    untied = manifest.model_copy(update={"tie_word_embeddings": False})
    with pytest.raises(IncompatibleVectorError, match="does not cover it"):
        check_tensors(untied, shapes, target="t")


def test_a_head_of_untied_donors_must_be_in_the_target(
    manifest: Manifest, shapes: dict[str, tuple[int, ...]]
) -> None:
    """Dropping it would add another vector than the one that was made."""
    head = {"lm_head.weight": manifest.tensors["model.embed_tokens.weight"]}
    with_head = manifest.model_copy(update={"tensors": manifest.tensors | head})
    check_tensors(with_head, shapes, target="t")
    untied = with_head.model_copy(update={"tie_word_embeddings": False})
    with pytest.raises(IncompatibleVectorError, match="the target has no such tensor"):
        check_tensors(untied, shapes, target="t")


def test_derived_buffers_need_no_vector(
    manifest: Manifest, shapes: dict[str, tuple[int, ...]]
) -> None:
    """Old checkpoints carry rotary tables that engines compute themselves."""
    shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = (16,)
    check_tensors(manifest, shapes, target="t")


def test_another_architecture_is_refused(manifest: Manifest) -> None:
    """The message names both."""
    config: dict[str, object] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    with pytest.raises(IncompatibleVectorError, match="donors have qwen2, the target has llama"):
        check_architecture(manifest, config, target="t")
