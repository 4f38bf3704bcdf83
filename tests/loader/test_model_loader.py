"""vllm_rvec.loader.model_loader: fused at load equals merged on disk, bit for bit."""

from __future__ import annotations

import itertools
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.checkpoints import (
    make_checkpoint,
    make_family,
    make_merged,
    make_vector,
    tensors,
)
from tests.support.quantized import quantized_copy
from tests.support.variations import (
    edited_vector,
    made_dense,
    resized,
    with_tensors,
    write_tokenizer,
)
from vllm_rvec.errors import (
    ConfigError,
    IncompatibleVectorError,
    RvecError,
    VectorNotFoundError,
)
from vllm_rvec.vector.compatibility.quantization import WAYS_OUT
from vllm_rvec.vector.compatibility.tokenizer import fingerprint
from vllm_rvec.vector.extract import extract

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family
    from tests.support.vllm_model import Loaded

ALPHAS = (-1.0, 0.0, 0.3, 1.0)


def load(
    model: Path, load_format: str = "auto", *, dtype: str = "bfloat16", **extra: Any
) -> Loaded:
    # vLLM takes seconds to import; tests that are deselected should not pay.
    from tests.support.vllm_model import load_parameters

    return load_parameters(model, load_format, dtype=dtype, **extra)


def assert_same(fused: Loaded, merged: Loaded) -> None:
    assert fused.parameters.keys() == merged.parameters.keys()
    for name, parameter in fused.parameters.items():
        assert parameter.numel() > 0, f"{name} was emptied: nothing to compare"
        assert torch.equal(
            parameter.view(torch.uint8), merged.parameters[name].view(torch.uint8)
        ), name


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("vector_fixture", ["vector", "vector_bf16"])
def test_fused_equals_merged_bit_for_bit(
    family: Family,
    vector_fixture: str,
    alpha: float,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Every parameter after `load_weights`, for float32 and bf16 vectors."""
    vector = request.getfixturevalue(vector_fixture)
    merged = load(make_merged(family.target, vector, alpha, tmp_path / "merged", torch.bfloat16))
    fused = load(family.target, "rvec", vector=str(vector), alpha=alpha)
    assert_same(fused, merged)
    ledger = fused.loader.stream.ledger
    assert not ledger.materialized
    assert ledger.copies == (0 if alpha == 0 else len(tensors(vector)))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_serving_dtype_is_rounded_to_once(
    family: Family, vector: Path, dtype: str, tmp_path: Path
) -> None:
    """Served in float32 or float16, the sum is that of a checkpoint merged in that dtype."""
    kind = getattr(torch, dtype)
    merged = load(make_merged(family.target, vector, 0.3, tmp_path / "m", kind), dtype=dtype)
    assert_same(load(family.target, "rvec", dtype=dtype, vector=str(vector), alpha=0.3), merged)


def test_where_a_gpu_would_add_changes_nothing_on_the_cpu(family: Family, vector: Path) -> None:
    """Its parameters are written straight, whatever the key says."""
    plain = load(family.target, "rvec", vector=str(vector), alpha=0.3)
    for where in ("host", "device"):
        fused = load(family.target, "rvec", vector=str(vector), alpha=0.3, fuse_on=where)
        assert fused.loader.stream.fuse_on == where
        assert fused.loader.stream.placer.summary() == ""
        assert_same(fused, plain)


def test_alpha_zero_is_the_target_bit_for_bit(family: Family, vector: Path) -> None:
    """The base variant is the unchanged target."""
    assert_same(load(family.target, "rvec", vector=str(vector), alpha=0), load(family.target))


def test_untied_embeddings_are_fused_too(tmp_path: Path) -> None:
    """An output head of its own gets its own part of the vector."""
    family = make_family(tmp_path, tied=False)
    vector = make_vector(family, tmp_path / "v")
    merged = load(make_merged(family.target, vector, 1.0, tmp_path / "merged", torch.bfloat16))
    fused = load(family.target, "rvec", vector=str(vector))
    assert "lm_head.weight" in tensors(vector)
    assert_same(fused, merged)


def test_a_sharded_target_is_fused_whole(family: Family, vector: Path, tmp_path: Path) -> None:
    """Shards of the target need not be those of the vector."""
    target = shutil.copytree(family.target, tmp_path / "target")
    whole = tensors(target)
    (target / "model.safetensors").unlink()
    names = sorted(whole)
    files = {
        "model-00001-of-00002.safetensors": names[:9],
        "model-00002-of-00002.safetensors": names[9:],
    }
    for file, part in files.items():
        save_file({n: whole[n] for n in part}, target / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f for f, part in files.items() for n in part}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    fused = load(target, "rvec", vector=str(vector), alpha=0.3)
    assert_same(fused, load(family.target, "rvec", vector=str(vector), alpha=0.3))


def test_threads_of_vllms_own_loader_change_nothing(family: Family, vector: Path) -> None:
    """`enable_multithread_load` is vLLM's, and goes through."""
    threaded = load(
        family.target,
        "rvec",
        vector=str(vector),
        alpha=0.3,
        enable_multithread_load=True,
        num_threads=2,
    )
    assert_same(threaded, load(family.target, "rvec", vector=str(vector), alpha=0.3))


def logged_error(caplog: pytest.LogCaptureFixture) -> str:
    # vLLM's own handler prints; the marker lets `serve` find the line in an engine's output.
    return "".join(r.getMessage() for r in caplog.records if "rvec error: " in r.getMessage())


@pytest.fixture
def engine_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The "vllm" logger does not propagate: listen to ours directly."""
    import logging

    import vllm  # noqa: F401 - it configures its loggers once, and drops what they had

    logger = logging.getLogger("vllm.rvec")
    logger.addHandler(caplog.handler)
    return caplog


def expect(
    error: type[RvecError], target: Path, log: pytest.LogCaptureFixture, **extra: Any
) -> RvecError:
    with pytest.raises(error) as caught:
        load(target, "rvec", **extra)
    assert f"rvec error: {error.__name__}" in logged_error(log)
    return caught.value


def test_unknown_keys_are_refused_by_name(
    family: Family, vector: Path, engine_log: pytest.LogCaptureFixture
) -> None:
    """A typing mistake must not serve another alpha than was meant."""
    error = expect(ConfigError, family.target, engine_log, vector=str(vector), alhpa=0.5)
    assert "unknown key 'alhpa'" in str(error)


def test_a_missing_vector_is_named(
    family: Family, tmp_path: Path, engine_log: pytest.LogCaptureFixture
) -> None:
    """Also at alpha 0: a base that would never be comparable is not started."""
    for alpha in (0, 1):
        expect(
            VectorNotFoundError, family.target, engine_log, vector=str(tmp_path / "x"), alpha=alpha
        )


def test_a_vector_that_does_not_fit_names_all_tensors(
    vector: Path, tmp_path: Path, engine_log: pytest.LogCaptureFixture
) -> None:
    """A target with a layer more: every tensor of it is uncovered."""
    target = make_checkpoint(tmp_path / "deeper", seed=0, layers=3)
    error = expect(IncompatibleVectorError, target, engine_log, vector=str(vector))
    uncovered = [p for p in error.problems if "in the target, the vector does not cover it" in p]
    assert len(uncovered) == 12
    assert "model.layers.2.mlp.up_proj.weight" in "".join(uncovered)


def test_another_architecture_is_refused(
    family: Family, vector: Path, tmp_path: Path, engine_log: pytest.LogCaptureFixture
) -> None:
    """Even where names and shapes agree."""
    other = edited_vector(vector, tmp_path / "v", model_type="llama")
    expect(IncompatibleVectorError, family.target, engine_log, vector=str(other))


@pytest.mark.parametrize("alpha", [0, 1])
def test_another_initialisation_is_refused_at_any_alpha(
    vector: Path, tmp_path: Path, alpha: float, engine_log: pytest.LogCaptureFixture
) -> None:
    """Same names and shapes, other weights: also a base that would be compared to nothing."""
    stranger = make_checkpoint(tmp_path / "stranger", seed=1)
    error = expect(IncompatibleVectorError, stranger, engine_log, vector=str(vector), alpha=alpha)
    assert error.problems[0].startswith("another pretrained initialisation")


def test_other_tokens_are_refused_before_any_weight_is_read(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """The target's own tokenizer.json is compared before the first tensor comes."""
    from vllm.model_executor.model_loader import get_model_loader

    from tests.support.vllm_model import engine_config

    write_tokenizer(tmp_path / "donor", [f"token {i}" for i in range(512)])
    tokens = fingerprint(tmp_path / "donor")
    known = edited_vector(vector, tmp_path / "v", tokenizer=tokens)
    target = shutil.copytree(family.target, tmp_path / "target")
    write_tokenizer(target, [f"other {i}" for i in range(512)])
    config = engine_config(target, "rvec", {"vector": str(known)}, "bfloat16")
    loader: Any = get_model_loader(config.load_config)
    with pytest.raises(IncompatibleVectorError) as caught:
        next(loader.get_all_weights(config.model_config, torch.nn.Module()))
    assert caught.value.problems[0] == "512 of 512 shared ids differ"


def test_force_fuses_what_fits_and_names_the_rest(
    vector: Path, tmp_path: Path, engine_log: pytest.LogCaptureFixture
) -> None:
    """Another initialisation with a layer more: every refusal is a warning in the log."""
    target = make_checkpoint(tmp_path / "deeper", seed=1, layers=3)
    forced = load(target, "rvec", vector=str(vector), alpha=0.3, force=True)
    merged = make_merged(target, vector, 0.3, tmp_path / "merged", torch.bfloat16)
    assert_same(forced, load(merged))
    messages = {record.getMessage() for record in engine_log.records}
    lines = [message for message in messages if "refused but forced" in message]
    assert sum("model.layers.2." in line for line in lines) == 12
    assert sum("another pretrained initialisation" in line for line in lines) == 1


def test_warnings_are_logged(
    family: Family, vector: Path, engine_log: pytest.LogCaptureFixture
) -> None:
    """What can't be compared is said at each load."""
    load(family.target, "rvec", vector=str(vector))
    assert "Vector and target: tokenizer: tokens are not compared" in engine_log.text


@pytest.mark.parametrize("encoding", ["sparse", "int8", "lowrank"])
def test_every_encoding_is_fused_as_it_decodes(
    family: Family, tmp_path: Path, encoding: str
) -> None:
    """Fused equals merged, bit for bit, for what is not stored dense."""
    made = extract(family.tuned, family.base, tmp_path / "v", encoding=encoding, rank=4)
    encodings = {entry.encoding for entry in made.manifest.tensors.values()}
    assert encoding in encodings
    dense = made_dense(made.output, tmp_path / "dense")
    merged = load(make_merged(family.target, dense, 0.3, tmp_path / "merged", torch.bfloat16))
    assert_same(load(family.target, "rvec", vector=str(made.output), alpha=0.3), merged)


def test_a_vector_without_the_prefix_is_fused_alike(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """Donors exported as bare models have no `model.` before their names."""
    sides = [
        with_tensors(
            side,
            tmp_path / side.name,
            {name.removeprefix("model."): tensor for name, tensor in tensors(side).items()},
        )
        for side in (family.tuned, family.base)
    ]
    bare = extract(sides[0], sides[1], tmp_path / "v", encoding="dense").output
    assert "norm.weight" in tensors(bare)
    fused = load(family.target, "rvec", vector=str(bare), alpha=0.3)
    assert_same(fused, load(family.target, "rvec", vector=str(vector), alpha=0.3))


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.3])
@pytest.mark.parametrize("case", list(itertools.product([448, 576], ["common", "skip-embeddings"])))
def test_a_vocabulary_of_another_size_is_exact(
    family: Family, vector: Path, tmp_path: Path, case: tuple[int, str], alpha: float
) -> None:
    """Rows that get nothing keep every bit, -0.0 too; alpha 0 is the target."""
    rows, policy = case
    target = resized(family.target, tmp_path / "target", rows)
    fused = load(target, "rvec", vector=str(vector), alpha=alpha, vocabulary=policy)
    embedding = "model.embed_tokens.weight"
    stored = tensors(
        make_merged(
            target, without(vector, embedding, tmp_path), alpha, tmp_path / "m", torch.bfloat16
        )
    )
    if policy == "common" and alpha:
        shared = min(rows, 512)
        v = tensors(vector)[embedding][:shared]
        theta = stored[embedding][:shared].float()
        stored[embedding][:shared] = (theta + torch.tensor(alpha) * v).bfloat16()
    assert_same(fused, load(with_tensors(target, tmp_path / "merged", stored)))


def without(vector: Path, name: str, folder: Path) -> Path:
    """Write a vector's tensors but one; where a tensor is missing, the target's stays."""
    kept = {n: tensor for n, tensor in tensors(vector).items() if n != name}
    (folder / "without").mkdir()
    save_file(kept, folder / "without" / "vector.safetensors")
    return folder / "without"


def test_a_vocabulary_of_another_size_is_refused_by_default(
    family: Family, vector: Path, tmp_path: Path, engine_log: pytest.LogCaptureFixture
) -> None:
    """The message names the way out."""
    target = resized(family.target, tmp_path / "target", 576)
    error = expect(IncompatibleVectorError, target, engine_log, vector=str(vector))
    assert "shape [512, 64] in the vector, [576, 64] in the target (the vocabulary policy" in str(
        error
    )


@pytest.mark.parametrize(("rows", "policy"), [(512, "strict"), (576, "common"), (448, "common")])
def test_a_stored_tied_head_is_fused_like_the_embedding_of_any_size(
    family: Family, vector: Path, tmp_path: Path, rows: int, policy: str
) -> None:
    """VLLM loads such a head as a matrix of its own: it must get the embedding's part of v."""
    target = resized(family.target, tmp_path / "target", rows)
    fused = load(target, "rvec", vector=str(vector), alpha=-1, vocabulary=policy)
    stored = tensors(target)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    twice = with_tensors(target, tmp_path / "twice", stored)
    assert_same(load(twice, "rvec", vector=str(vector), alpha=-1, vocabulary=policy), fused)


def test_a_pickle_target_is_refused(family: Family, vector: Path, tmp_path: Path) -> None:
    """The load format reads safetensors only; vLLM says that it finds none."""
    target = shutil.copytree(family.target, tmp_path / "target")
    torch.save({}, target / "pytorch_model.bin")
    (target / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"Cannot find any model weights"):
        load(target, "rvec", vector=str(vector))


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_quantized_target_is_refused_before_any_weight_is_read(
    family: Family, vector: Path, tmp_path: Path, force: bool, alpha: float
) -> None:
    """By its headers: the first tensor never comes. A base that can't be compared neither."""
    from vllm.model_executor.model_loader import get_model_loader

    from tests.support.vllm_model import engine_config

    target = quantized_copy(family.target, tmp_path / "target", "fp8")
    extra: dict[str, object] = {"vector": str(vector), "alpha": alpha, "force": force}
    config = engine_config(target, "rvec", extra, "bfloat16")
    loader: Any = get_model_loader(config.load_config)
    with pytest.raises(IncompatibleVectorError) as caught:
        next(loader.get_all_weights(config.model_config, torch.nn.Module()))
    assert "the target is quantized (fp8)" in str(caught.value)
    assert caught.value.fix == WAYS_OUT


def test_codes_that_no_configuration_tells_of_are_not_served_by_force(
    family: Family, vector: Path, tmp_path: Path, engine_log: pytest.LogCaptureFixture
) -> None:
    """Found at the end of the stream, before an engine is ready."""
    target = quantized_copy(family.target, tmp_path / "target", "compressed-tensors")
    shutil.copy(family.target / "config.json", target)
    stored = {n: t for n, t in tensors(target).items() if not n.endswith("_scale")}
    with_tensors(family.target, tmp_path / "codes", stored)
    error = expect(
        IncompatibleVectorError, tmp_path / "codes", engine_log, vector=str(vector), force=True
    )
    assert "changes 14 quantized tensors" in error.what


def recipe_reference(
    target: Path, folder: Path, terms: list[tuple[Path, dict[str, float]]]
) -> Path:
    """Merge a recipe to disk by the formula, written out: alphas by name, in the order given."""
    merged = {}
    for name, theta in tensors(target).items():
        total, changed = theta.float(), False
        for vector, alphas in terms:
            if alphas.get(name, 0):
                v = tensors(vector)[name].float()
                total, changed = total + torch.tensor(alphas[name]) * v, True
        merged[name] = total.bfloat16() if changed else theta
    return with_tensors(target, folder, merged)


def test_a_recipe_is_fused_as_it_is_merged(family: Family, vector: Path, tmp_path: Path) -> None:
    """Two vectors, each with layers, kinds and a gradient of its own; one alpha over both."""
    other = extract(family.base, family.tuned, tmp_path / "other", encoding="auto").output
    dense = made_dense(other, tmp_path / "dense")
    recipe = [
        {"path": str(vector), "alpha": {"attention": 0.5, "mlp": [0.2, 1], "default": 0}},
        {"path": str(other), "alpha": -0.7, "layers": "1", "exclude": ["*.bias"]},
    ]
    names = tensors(family.target)
    first = {
        name: 0.3 * (0.5 if "self_attn" in name else (0.2, 1.0)["layers.1." in name])
        for name in names
        if "self_attn" in name or ".mlp." in name
    }
    second = {n: 0.3 * -0.7 for n in names if "layers.1." in n and not n.endswith(".bias")}
    merged = recipe_reference(
        family.target, tmp_path / "merged", [(vector, first), (dense, second)]
    )
    fused = load(family.target, "rvec", vectors=recipe, alpha=0.3)
    assert_same(fused, load(merged))
    assert fused.loader.stream.ledger.copies == len(first.keys() | second.keys())
    assert_same(load(family.target, "rvec", vectors=recipe, alpha=0), load(family.target))


def test_the_order_of_vectors_is_the_order_of_adding(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """Sums of floats depend on it; with three terms in float32 even so small models show it."""
    paths = [str(vector)] * 2
    both = [{"path": paths[0], "alpha": 1e6}, {"path": paths[1], "alpha": -1e6 + 1}]
    there = load(family.target, "rvec", dtype="float32", vectors=both)
    back = load(family.target, "rvec", dtype="float32", vectors=both[::-1])
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(there.parameters[name], back.parameters[name])


def test_a_part_that_the_recipe_leaves_out_may_not_fit(
    family: Family, vector: Path, tmp_path: Path, engine_log: pytest.LogCaptureFixture
) -> None:
    """An embedding of another size is no obstacle where nothing is added to it."""
    target = resized(family.target, tmp_path / "target", 576)
    fused = load(target, "rvec", vectors=[{"path": str(vector), "exclude": ["*embed*"]}])
    embedding = "model.embed_tokens.weight"
    assert torch.equal(fused.parameters[embedding], tensors(target)[embedding])
    assert "model.embed_tokens.weight: nothing is added to it (the recipe leaves it out)" in (
        engine_log.text
    )


@pytest.mark.parametrize("alpha", [0.3, -1.0])
def test_vectors_of_other_vocabularies_add_the_rows_that_they_have(
    family: Family, vector: Path, tmp_path: Path, alpha: float
) -> None:
    """One with fewer rows than the target, one with more; rows that only one side has stay."""
    embedding, rows = "model.embed_tokens.weight", 512
    paths, terms = [], []
    for count, share in ((448, 0.5), (576, 1.0)):
        donors = [
            resized(side, tmp_path / f"{side.name}-{count}", count)
            for side in (family.tuned, family.base)
        ]
        made = extract(donors[0], donors[1], tmp_path / f"v-{count}", encoding="dense").output
        paths.append({"path": str(made), "alpha": share})
        terms.append((tensors(made), alpha * share))
    merged = {}
    for name, theta in tensors(family.target).items():
        total = theta.float()
        for v, factor in terms:
            shared = min(len(v[name]), len(theta)) if name == embedding else len(theta)
            total[:shared] = total[:shared] + torch.tensor(factor) * v[name][:shared].float()
        merged[name] = total.bfloat16()
    fused = load(family.target, "rvec", vectors=paths, alpha=alpha, vocabulary="common")
    assert len(tensors(family.target)[embedding]) == rows
    assert_same(fused, load(with_tensors(family.target, tmp_path / "merged", merged)))


def test_every_vector_of_a_recipe_is_checked(
    family: Family, vector: Path, tmp_path: Path, engine_log: pytest.LogCaptureFixture
) -> None:
    """The second one has a layer too few."""
    donors = [
        make_checkpoint(tmp_path / n, seed=0, noise=x, layers=1)
        for n, x in (("t", 0.1), ("b", 0.0))
    ]
    short = extract(donors[0], donors[1], tmp_path / "short").output
    recipe = [{"path": str(vector)}, {"path": str(short)}]
    error = expect(IncompatibleVectorError, family.target, engine_log, vectors=recipe)
    assert str(tmp_path / "short") in str(error)
    assert any("the vector does not cover it" in problem for problem in error.problems)


def test_a_product_of_alphas_beyond_float32_is_refused(
    family: Family, vector: Path, engine_log: pytest.LogCaptureFixture
) -> None:
    """Each may be a number of float32 where their product is none."""
    recipe = [{"path": str(vector), "alpha": 1e30}]
    error = expect(ConfigError, family.target, engine_log, vectors=recipe, alpha=1e20)
    assert "beyond the range of float32" in error.problems[0]
