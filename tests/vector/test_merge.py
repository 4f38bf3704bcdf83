"""vllm_rvec.vector.merge: on disk what the loader makes in memory, bit for bit."""

from __future__ import annotations

import json
import logging
import os
import shutil
from typing import TYPE_CHECKING, Any

import blake3
import pytest
import torch
from safetensors.torch import save_file

from tests.support.checkpoints import make_checkpoint, make_family, make_vector, tensors
from vllm_rvec.checkpoint.fetch import Located
from vllm_rvec.checkpoint.table import INDEX_NAME
from vllm_rvec.errors import (
    CheckpointNotFoundError,
    ConfigError,
    IncompatibleVectorError,
    VectorCorruptError,
)
from vllm_rvec.vector.extract import extract
from vllm_rvec.vector.manifest import MANIFEST_NAME
from vllm_rvec.vector.merge import merge
from vllm_rvec.vector.recipe import RecipeVector

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family
    from tests.support.vllm_model import Loaded

Tensors = dict[str, torch.Tensor]


def load(model: Path, load_format: str = "auto", **extra: Any) -> Loaded:
    # vLLM takes seconds to import; tests that are deselected should not pay.
    from tests.support.vllm_model import load_parameters

    return load_parameters(model, load_format, **extra)


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.numel() > 0, f"{name} was emptied: nothing to compare"
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


def summed(target: Path, *terms: tuple[Path, float]) -> Tensors:
    """The reference for several dense vectors, written out."""
    parts = [(tensors(vector), torch.tensor(alpha)) for vector, alpha in terms]
    result = {}
    for name, theta in tensors(target).items():
        total = theta.float()
        for v, alpha in parts:
            total = total + alpha * v[name].float()
        result[name] = total.to(theta.dtype)
    return result


def sharded(target: Path, folder: Path) -> Path:
    """The same checkpoint in two files."""
    shutil.copytree(target, folder)
    whole = tensors(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(whole)
    files = {
        "model-00001-of-00002.safetensors": names[:9],
        "model-00002-of-00002.safetensors": names[9:],
    }
    for file, part in files.items():
        save_file({n: whole[n] for n in part}, folder / file, metadata={"format": "pt"})
    weight_map = {n: f for f, part in files.items() for n in part}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"own": 1}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "how",
    [
        {"encoding": "dense"},
        {"encoding": "dense", "dtype": "bfloat16"},
        {"encoding": "sparse"},
        {"encoding": "int8"},
        {"encoding": "lowrank", "rank": 4},
    ],
    ids=lambda how: "-".join(map(str, how.values())),
)
@pytest.mark.parametrize("alpha", [0.3, -1.0])
def test_merged_on_disk_equals_fused_at_load(
    family: Family, how: dict[str, Any], alpha: float, tmp_path: Path
) -> None:
    """Every parameter after vLLM's `load_weights`, for every encoding."""
    vector = extract(family.tuned, family.base, tmp_path / "v", **how).output
    merged = merge(family.target, [vector], tmp_path / "out", alphas=[alpha])
    fused = load(family.target, "rvec", vector=str(vector), alpha=alpha)
    assert_same(load(merged.output).parameters, fused.parameters)
    assert merged.changed_tensors == merged.tensors == len(tensors(family.target))


def test_a_recipe_merges_as_it_fuses(family: Family, vector: Path, tmp_path: Path) -> None:
    """Kinds, a gradient, layers and patterns, over two vectors of two encodings and one alpha."""
    other = extract(family.base, family.tuned, tmp_path / "other", encoding="int8").output
    recipe = [
        {"path": str(vector), "alpha": {"attention": 0.7, "mlp": [0.2, 1], "default": 0}},
        {"path": str(other), "alpha": [-0.7, 0.1], "layers": "1", "exclude": ["*.bias"]},
    ]
    merged = merge(
        family.target,
        [vector, other],
        tmp_path / "out",
        alphas=[0.3, 0.3],
        recipe=[RecipeVector.model_validate(each) for each in recipe],
    )
    fused = load(family.target, "rvec", vectors=recipe, alpha=0.3)
    assert_same(load(merged.output).parameters, fused.parameters)
    assert merged.changed_tensors == fused.loader.stream.ledger.copies
    plain, target = tensors(merged.output), tensors(family.target)
    first = {n for n in target if ".self_attn." in n or ".mlp." in n}
    second = {n for n in target if "layers.1." in n and not n.endswith(".bias")}
    assert merged.changed_tensors == len(first | second)
    assert all(not plain[name].equal(target[name]) for name in first)
    assert all(plain[name].equal(target[name]) for name in target.keys() - first - second)


def test_a_recipe_that_does_not_fit_leaves_nothing(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """The check asks it before anything is written."""
    recipe = [RecipeVector(path="a", layers="7")]
    with pytest.raises(ConfigError, match="layer 7 is not there: the vector has layers 0-1"):
        merge(family.target, [vector], tmp_path / "out", recipe=recipe)
    assert list(tmp_path.iterdir()) == []


def test_untied_embeddings_merge_as_they_fuse(tmp_path: Path) -> None:
    """An output head of its own gets its own part."""
    family = make_family(tmp_path, tied=False)
    vector = make_vector(family, tmp_path / "v")
    out = merge(family.target, [vector], tmp_path / "out", alphas=[0.3]).output
    assert_same(tensors(out), summed(family.target, (vector, 0.3)))
    fused = load(family.target, "rvec", vector=str(vector), alpha=0.3)
    assert_same(load(out).parameters, fused.parameters)


def test_a_tied_head_that_is_stored_too_merges_as_it_fuses(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """Both copies of the matrix get the embedding's part."""
    target = shutil.copytree(family.target, tmp_path / "target")
    stored = tensors(target)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    found = tensors(merge(target, [vector], tmp_path / "out", alphas=[0.3]).output)
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    fused = load(target, "rvec", vector=str(vector), alpha=0.3)
    assert_same(load(tmp_path / "out").parameters, fused.parameters)


def test_a_sharded_target_keeps_its_shards_and_index(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """Same files, same sizes, the same index; and loaded, what is fused from one file."""
    target = sharded(family.target, tmp_path / "target")
    out = merge(target, [vector], tmp_path / "out", alphas=[0.3]).output
    sizes = [{p.name: p.stat().st_size for p in f.glob("*.safetensors")} for f in (out, target)]
    assert sizes[0] == sizes[1]
    assert (out / INDEX_NAME).read_bytes() == (target / INDEX_NAME).read_bytes()
    fused = load(family.target, "rvec", vector=str(vector), alpha=0.3)
    assert_same(load(out).parameters, fused.parameters)


def test_several_vectors_are_summed_in_the_order_given(
    family: Family, vector: Path, vector_bf16: Path, tmp_path: Path
) -> None:
    """One rounding to the target's dtype, at the end."""
    terms = [(vector, 0.3), (vector_bf16, -0.7), (vector, 1.0)]
    paths, alphas = zip(*terms, strict=True)
    out = merge(family.target, paths, tmp_path / "out", alphas=alphas).output
    assert_same(tensors(out), summed(family.target, *terms))


def test_without_alphas_each_is_one_and_zero_leaves_a_vector_out(
    family: Family, vector: Path, vector_bf16: Path, tmp_path: Path
) -> None:
    """The default is the full vector; alpha 0 is as if the vector were not named."""
    plain = merge(family.target, [vector], tmp_path / "plain").output
    both = merge(family.target, [vector_bf16, vector], tmp_path / "both", alphas=[0, 1]).output
    assert_same(tensors(plain), summed(family.target, (vector, 1.0)))
    assert_same(tensors(plain), tensors(both))


def test_configuration_and_tokenizer_come_along_and_training_states_do_not(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """What is left behind is named."""
    target = shutil.copytree(family.target, tmp_path / "target")
    (target / "tokenizer_config.json").write_text("{}")
    (target / "LICENSE").write_text("terms")
    (target / "training_args.bin").write_bytes(b"pickle")
    (target / "README.md").write_text("---\nlicense: mit\n---\nThe target's own words.\n")
    made = merge(Located(target, "org/m", "0" * 40), [vector], tmp_path / "out", alphas=[0.3])
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "LICENSE"):
        assert (made.output / name).read_bytes() == (target / name).read_bytes()
    assert made.companions.left_behind == ("training_args.bin",)
    assert not (made.output / "training_args.bin").exists()
    card = (made.output / "README.md").read_text()
    digest = blake3.blake3((vector / MANIFEST_NAME).read_bytes()).hexdigest()
    assert "license: mit" in card
    assert "org/m" in card
    assert f"| 0.3 | `{digest}` |" in card
    assert "own words" not in card


def test_transformers_reads_it(family: Family, vector: Path, tmp_path: Path) -> None:
    """A plain checkpoint for whoever knows nothing of vectors."""
    from transformers import AutoModelForCausalLM

    out = merge(family.target, [vector], tmp_path / "out").output
    weights = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).state_dict()
    weights.pop("lm_head.weight")
    assert_same(weights, tensors(out))


def with_rows(target: Path, folder: Path, rows: int) -> Path:
    """The same checkpoint with another number of embedding rows."""
    shutil.copytree(target, folder)
    stored = tensors(folder)
    embedding = stored["model.embed_tokens.weight"]
    wider = torch.full((rows, embedding.shape[1]), -0.0, dtype=embedding.dtype)
    wider[: embedding.shape[0]] = embedding[:rows]
    stored["model.embed_tokens.weight"] = wider
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    return folder


@pytest.mark.parametrize("rows", [500, 540])
def test_the_vocabulary_policy_decides_about_embedding_rows(
    family: Family, vector: Path, rows: int, tmp_path: Path
) -> None:
    """The default refuses; common adds the shared rows; skip-embeddings adds to none of them."""
    target = with_rows(family.target, tmp_path / "target", rows)
    name, shared = "model.embed_tokens.weight", min(rows, 512)
    with pytest.raises(IncompatibleVectorError, match="embed_tokens"):
        merge(target, [vector], tmp_path / "strict")
    whole = summed(family.target, (vector, -0.3))[name]
    theta = tensors(target)[name]
    common = merge(target, [vector], tmp_path / "c", alphas=[-0.3], vocabulary="common").output
    expected = torch.cat([whole[:shared], theta[shared:]])
    assert_same({name: tensors(common)[name]}, {name: expected})
    skipped = merge(target, [vector], tmp_path / "s", vocabulary="skip-embeddings").output
    assert_same({name: tensors(skipped)[name]}, {name: theta})
    assert not torch.equal(
        tensors(skipped)["model.norm.weight"], tensors(target)["model.norm.weight"]
    )


def test_a_vector_of_another_model_is_refused_and_nothing_is_written(
    vector: Path, tmp_path: Path
) -> None:
    """Every tensor that does not match is in the error."""
    target = make_checkpoint(tmp_path / "deeper", seed=0, layers=3)
    with pytest.raises(IncompatibleVectorError) as caught:
        merge(target, [vector], tmp_path / "out")
    assert len(caught.value.problems) >= 12
    assert [path.name for path in tmp_path.iterdir()] == ["deeper"]


def test_force_goes_on_says_so_and_leaves_what_does_not_fit(
    vector: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The check's evidence is logged; tensors that the vector does not cover are the target's."""
    target = make_checkpoint(tmp_path / "deeper", seed=0, layers=3)
    with caplog.at_level(logging.WARNING):
        merged = merge(target, [vector], tmp_path / "out", force=True)
    assert "model.layers.2.mlp.up_proj.weight" in caplog.text
    assert merged.changed_tensors == 26
    found, theta, v = tensors(merged.output), tensors(target), tensors(vector)
    for name, tensor in theta.items():
        expected = (tensor.float() + v[name]).bfloat16() if name in v else tensor
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("alphas", [[0.3], [0.3, 0.3, 0.3]])
def test_numbers_of_vectors_and_alphas_must_agree(
    family: Family, vector: Path, alphas: list[float], tmp_path: Path
) -> None:
    """Which alpha is whose can't be guessed."""
    with pytest.raises(ConfigError, match=f"2 vectors and {len(alphas)} alphas"):
        merge(family.target, [vector, vector], tmp_path / "out", alphas=alphas)
    with pytest.raises(ConfigError, match="0 vectors"):
        merge(family.target, [], tmp_path / "out", alphas=[])


def test_every_alpha_that_can_not_be_used_is_named(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """All at once, before anything is read."""
    with pytest.raises(ConfigError) as caught:
        merge(family.target, [vector] * 3, tmp_path / "out", alphas=[float("nan"), 1.0, 1e39])
    assert caught.value.problems == (
        "alpha nan is not finite",
        "alpha 1e+39 is beyond the range of float32",
    )


def test_a_damaged_vector_is_not_added(family: Family, vector: Path, tmp_path: Path) -> None:
    """One byte of a shard: the vector is verified before anything is written."""
    damaged = shutil.copytree(vector, tmp_path / "v")
    shard = damaged / "vector.safetensors"
    with shard.open("r+b") as file:
        file.seek(-7, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(VectorCorruptError, match=r"vector\.safetensors"):
        merge(family.target, [vector, damaged], tmp_path / "out", alphas=[1.0, 0.5])
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


def test_a_sum_beyond_the_dtype_names_its_tensors_and_leaves_nothing(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """No infinity is written, whatever the alpha."""
    target = shutil.copytree(family.target, tmp_path / "target")
    halves = {name: tensor.half() for name, tensor in tensors(target).items()}
    save_file(halves, target / "model.safetensors")
    with pytest.raises(ConfigError, match="sum is not finite") as caught:
        merge(target, [vector], tmp_path / "out", alphas=[1e7])
    assert "model.embed_tokens.weight" in caught.value.problems
    assert list(tmp_path.iterdir()) == [target]


def test_an_interrupted_merge_leaves_nothing(family: Family, vector: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of a shard: no output, no remains."""

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(family.target, [vector], tmp_path / "out", on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_never_touched(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """Least of all the target itself."""
    before = (family.target / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        merge(family.target, [vector], family.target)
    assert (family.target / "model.safetensors").read_bytes() == before


def test_a_missing_target_is_named(vector: Path, tmp_path: Path) -> None:
    """As by every other command."""
    with pytest.raises(CheckpointNotFoundError, match="nowhere"):
        merge(tmp_path / "nowhere", [vector], tmp_path / "out")


def test_a_forced_merge_logs_the_first_findings_and_counts_the_rest(
    vector: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a much deeper target; a screen holds it."""
    target = make_checkpoint(tmp_path / "deeper", seed=0, layers=5)
    with caplog.at_level(logging.WARNING):
        merge(target, [vector], tmp_path / "out", force=True)
    assert len(caplog.messages) < 20
    assert any("more: `vllm-rvec check` has all" in message for message in caplog.messages)
