"""vllm_rvec.vector.compatibility.structure: architecture, names, shapes, tying, vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vllm_rvec.checkpoint.table import read_config, read_table
from vllm_rvec.errors import ConfigError
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.compatibility import Verdict
from vllm_rvec.vector.compatibility.structure import (
    VOCABULARY_POLICIES,
    Pairing,
    architecture_findings,
    is_for_language_part,
    structure_level,
    tensor_findings,
    tensor_problems,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family
    from vllm_rvec.vector import Manifest

EMBEDDING = "model.embed_tokens.weight"
Shapes = dict[str, tuple[int, ...]]


@pytest.fixture
def manifest(vector: Path) -> Manifest:
    return VectorReader(vector).manifest


@pytest.fixture
def shapes(family: Family) -> Shapes:
    return {name: info.shape for name, info in read_table(family.target).items()}


def problems(manifest: Manifest, shapes: Shapes, vocabulary: str = "strict") -> list[str]:
    return tensor_problems(Pairing(manifest, vocabulary), shapes)


def warnings(manifest: Manifest, shapes: Shapes, vocabulary: str = "strict") -> list[str]:
    found = tensor_findings(Pairing(manifest, vocabulary), shapes)
    return [finding.text for finding in found if finding.verdict is Verdict.WARN]


def test_a_target_of_the_family_passes(manifest: Manifest, shapes: Shapes, family: Family) -> None:
    """Same names, same shapes, same architecture; nothing to warn of."""
    level = structure_level(
        architecture_findings(manifest, read_config(family.target)),
        tensor_findings(Pairing(manifest), shapes, is_tied=True),
    )
    assert level.verdict is Verdict.PASS
    assert level.summary == "architecture, names and shapes match"
    assert f"covers {len(shapes)} of the target's {len(shapes)}" in level.findings[-1].text


def test_every_mismatch_is_reported(manifest: Manifest, shapes: Shapes) -> None:
    """Missing in the target, not covered by the vector, misshapen: all at once."""
    shapes.pop("model.norm.weight")
    shapes["model.layers.9.mlp.up_proj.weight"] = (1, 1)
    shapes[EMBEDDING] = (1, 1)
    found = tensor_findings(Pairing(manifest), shapes)
    level = structure_level((), found)
    assert level.summary == "3 tensors don't match"
    assert level.numbers == {"mismatched_tensors": 3}
    assert [text.split(":")[0] for text in level.texts(Verdict.REFUSE)] == [
        "model.norm.weight",
        "model.layers.9.mlp.up_proj.weight",
        EMBEDDING,
    ]
    assert "shape [512, 64] in the vector, [1, 1] in the target" in found[2].text


def test_a_tied_head_gets_the_embeddings_part(manifest: Manifest, shapes: Shapes) -> None:
    """Donors that are tied store no head: a target's stored head is covered all the same."""
    shapes["lm_head.weight"] = (512, 64)
    assert not problems(manifest, shapes)
    assert Pairing(manifest).part_for("lm_head.weight") == EMBEDDING
    untied = manifest.model_copy(update={"tie_word_embeddings": False})
    assert problems(untied, shapes) == [
        "lm_head.weight: in the target, the vector does not cover it"
    ]


def test_a_head_of_its_own_against_tied_donors_is_a_warning(
    manifest: Manifest, shapes: Shapes
) -> None:
    """It is no longer the embedding whose part it gets; a head stored twice is."""
    shapes["lm_head.weight"] = (512, 64)
    for is_tied, count in ((False, 1), (True, 0), (None, 0)):
        found = tensor_findings(Pairing(manifest), shapes, is_tied=is_tied)
        assert sum(finding.verdict is Verdict.WARN for finding in found) == count


def test_a_head_of_untied_donors_must_be_in_the_target(manifest: Manifest, shapes: Shapes) -> None:
    """Dropping it would add another vector than the one that was made."""
    head = {"lm_head.weight": manifest.tensors[EMBEDDING]}
    with_head = manifest.model_copy(update={"tensors": manifest.tensors | head})
    assert not problems(with_head, shapes)
    untied = with_head.model_copy(update={"tie_word_embeddings": False})
    assert problems(untied, shapes) == [
        "lm_head.weight: in the vector, the target has no such tensor"
    ]


def test_a_tied_target_that_stores_its_head_takes_no_part_for_it(
    manifest: Manifest, shapes: Shapes
) -> None:
    """Engines don't read that head: its part of the vector would be lost without a word."""
    head = {"lm_head.weight": manifest.tensors[EMBEDDING]}
    untied = manifest.model_copy(
        update={"tensors": manifest.tensors | head, "tie_word_embeddings": False}
    )
    shapes["lm_head.weight"] = (512, 64)
    for is_tied, policy, count in (
        (True, "strict", 1),
        (False, "strict", 0),
        (None, "strict", 0),
        (True, "skip-embeddings", 0),
    ):
        found = tensor_findings(Pairing(untied, policy), shapes, is_tied=is_tied)
        assert sum(finding.verdict is Verdict.REFUSE for finding in found) == count


def test_derived_buffers_need_no_vector(manifest: Manifest, shapes: Shapes) -> None:
    """Old checkpoints carry rotary tables that engines compute themselves."""
    shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = (16,)
    assert not problems(manifest, shapes)


@pytest.mark.parametrize("prefixed", ["vector", "target"])
def test_a_prefix_on_one_side_changes_nothing(
    manifest: Manifest, shapes: Shapes, prefixed: str
) -> None:
    """`model.` before the names tells how a model was exported, not what it is."""
    if prefixed == "vector":
        shapes = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    else:
        bare = {name.removeprefix("model."): entry for name, entry in manifest.tensors.items()}
        manifest = manifest.model_copy(update={"tensors": bare})
    assert not problems(manifest, shapes)


def test_names_that_are_equal_without_the_prefix_stand_for_themselves(
    manifest: Manifest, shapes: Shapes
) -> None:
    """Where a vector has both `x` and `model.x`, neither is taken for the other."""
    twice = manifest.tensors | {"norm.weight": manifest.tensors["model.norm.weight"]}
    pairing = Pairing(manifest.model_copy(update={"tensors": twice}))
    assert pairing.part_for("norm.weight") == "norm.weight"
    assert pairing.part_for("model.norm.weight") == "model.norm.weight"
    assert pairing.part_for("layers.0.mlp.up_proj.weight") is None


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "model."])
def test_a_language_models_vector_is_for_the_language_part_of_another_model(
    manifest: Manifest, shapes: Shapes, prefix: str
) -> None:
    """What else a multimodal target has needs no part; a layer of the language part does."""
    shapes = {prefix + name.removeprefix("model."): shape for name, shape in shapes.items()}
    shapes |= {"vision_tower.layers.0.mlp.fc1.weight": (4, 4), "visual.norm.weight": (4,)}
    config = {"model_type": "llava", "text_config": {"model_type": "qwen2"}}
    assert is_for_language_part(manifest, config)
    (warning,) = architecture_findings(manifest, config)
    assert warning.verdict is Verdict.WARN
    assert "have qwen2, the language part of the target's llava" in warning.text
    pairing = Pairing(manifest, is_partial=True)
    assert not tensor_problems(pairing, shapes)
    assert len(tensor_problems(Pairing(manifest), shapes)) == 2
    shapes[f"{prefix}layers.9.mlp.up_proj.weight"] = (1, 1)
    assert tensor_problems(pairing, shapes) == [
        f"{prefix}layers.9.mlp.up_proj.weight: in the target, the vector does not cover it"
    ]


def test_the_language_parts_of_two_exports_pair(manifest: Manifest, shapes: Shapes) -> None:
    """The head too, which may stand within the part or beside it."""
    entries = {"language_model." + name: entry for name, entry in manifest.tensors.items()}
    head = {"language_model.lm_head.weight": manifest.tensors[EMBEDDING]}
    whole = manifest.model_copy(
        update={"tensors": entries | head, "tie_word_embeddings": False, "model_type": "llava"}
    )
    exported = {"model.language_model." + n.removeprefix("model."): s for n, s in shapes.items()}
    assert not problems(whole, exported | {"lm_head.weight": (512, 64)})
    assert Pairing(whole).is_skipped("x") is False
    assert Pairing(whole, "skip-embeddings").is_skipped("language_model.lm_head.weight")


@pytest.mark.parametrize(
    ("config", "is_part"),
    [
        ({"model_type": "qwen2_5_vl"}, True),
        ({"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2_vl_text"}}, True),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, False),
        ({"model_type": "qwen2", "text_config": {"model_type": "qwen2"}}, False),
        ({"model_type": "qwen3", "text_config": "qwen2"}, False),
        ({}, False),
    ],
)
def test_the_language_part_is_known_by_its_type(
    manifest: Manifest, config: dict[str, object], is_part: bool
) -> None:
    """A language model's vector is for another kind of model only where its type is inside."""
    assert is_for_language_part(manifest, config) is is_part
    nameless = manifest.model_copy(update={"model_type": ""})
    assert not is_for_language_part(nameless, config)


def test_two_tensors_for_one_part_are_refused(manifest: Manifest, shapes: Shapes) -> None:
    """Names that differ only in what stands before them: only one of them can be meant."""
    shapes["language_model.model.norm.weight"] = shapes["model.norm.weight"]
    (refusal,) = problems(manifest, shapes)
    assert refusal == (
        "model.norm.weight: language_model.model.norm.weight is in the target too, and the vector "
        "has one tensor for both"
    )


def test_a_vector_of_some_modules_leaves_the_others(manifest: Manifest, shapes: Shapes) -> None:
    """`complete: false` says that a target may have more; a complete vector's may not."""
    some = {n: entry for n, entry in manifest.tensors.items() if "mlp" in n}
    partial = manifest.model_copy(update={"tensors": some, "complete": False})
    assert not problems(partial, shapes)
    (found,) = tensor_findings(Pairing(partial), shapes)
    assert f"covers {len(some)} of the target's {len(shapes)} tensors" in found.text
    assert problems(partial.model_copy(update={"complete": True}), shapes)


@pytest.mark.parametrize("rows", [448, 576])
def test_another_number_of_rows_is_a_matter_of_policy(
    manifest: Manifest, shapes: Shapes, rows: int
) -> None:
    """Strict refuses and names the way out; the others say what they leave out."""
    shapes[EMBEDDING] = (rows, 64)
    (refusal,) = problems(manifest, shapes)
    assert refusal == (
        f"{EMBEDDING}: shape [512, 64] in the vector, [{rows}, 64] in the target (the vocabulary "
        "policy common adds the shared rows)"
    )
    assert not problems(manifest, shapes, "common")
    assert not problems(manifest, shapes, "skip-embeddings")
    (common,) = warnings(manifest, shapes, "common")
    assert common == (
        f"{EMBEDDING}: nothing is added to rows 512 to 575"
        if rows > 512
        else f"{EMBEDDING}: rows 448 to 511 of the vector are left out"
    )
    assert warnings(manifest, shapes, "skip-embeddings") == [
        f"{EMBEDDING}: nothing is added to it (skip-embeddings)"
    ]


def test_common_is_for_rows_only(manifest: Manifest, shapes: Shapes) -> None:
    """Another width, or other rows of another matrix, is refused under every policy but one."""
    shapes[EMBEDDING] = (512, 32)
    shapes["model.layers.0.mlp.up_proj.weight"] = (127, 64)
    assert len(problems(manifest, shapes, "common")) == 2
    assert len(problems(manifest, shapes, "skip-embeddings")) == 1


def test_a_policy_of_another_name_is_refused(manifest: Manifest) -> None:
    """The message has those that there are."""
    with pytest.raises(ConfigError, match=", ".join(VOCABULARY_POLICIES)):
        Pairing(manifest, "some")


def test_another_architecture_is_refused(manifest: Manifest) -> None:
    """Both are named, for model type and architecture."""
    config: dict[str, object] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    level = structure_level(architecture_findings(manifest, config), ())
    assert level.verdict is Verdict.REFUSE
    assert level.summary == "another architecture"
    assert level.findings[0].text == (
        "model type: the vector's donors have qwen2, the target has llama"
    )
    assert "Qwen2ForCausalLM, the target has LlamaForCausalLM" in level.findings[1].text


@pytest.mark.parametrize("config", [{}, {"model_type": "qwen2", "architectures": "Qwen2"}])
def test_an_architecture_that_nobody_names_is_a_warning(
    manifest: Manifest, config: dict[str, object]
) -> None:
    """What can't be compared is said, not guessed."""
    findings = architecture_findings(manifest, config)
    assert Verdict.WARN in [finding.verdict for finding in findings]
    nameless = manifest.model_copy(update={"model_type": "", "architecture": ""})
    assert {f.verdict for f in architecture_findings(nameless, config)} == {Verdict.WARN}
