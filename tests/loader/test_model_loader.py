"""vllm_rvec.loader.model_loader: fused at load equals merged on disk, bit for bit."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.checkpoints import make_family, make_merged, make_vector, tensors
from vllm_rvec.errors import (
    ConfigError,
    IncompatibleVectorError,
    RvecError,
    VectorCorruptError,
    VectorNotFoundError,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family
    from tests.support.vllm_model import Loaded

ALPHAS = (-1.0, 0.0, 0.3, 1.0)


def load(
    model: Path, load_format: str = "auto", *, dtype: str = "bfloat16", **extra: object
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


def test_a_tied_head_that_the_checkpoint_stores_too_is_fused_like_the_embedding(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """VLLM loads such a head as a matrix of its own: it must get the embedding's part of v."""
    target = shutil.copytree(family.target, tmp_path / "target")
    stored = tensors(target)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    fused = load(target, "rvec", vector=str(vector), alpha=1)
    assert_same(fused, load(family.target, "rvec", vector=str(vector), alpha=1))


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
    from tests.support.checkpoints import make_checkpoint

    target = make_checkpoint(tmp_path / "deeper", seed=1, layers=3)
    error = expect(IncompatibleVectorError, target, engine_log, vector=str(vector))
    assert len(error.problems) == 12
    assert (
        "model.layers.2.mlp.up_proj.weight: in the target, the vector does not cover it"
        in "".join(error.problems)
    )


def test_a_nan_in_the_vector_stops_the_load(
    family: Family, vector: Path, tmp_path: Path, engine_log: pytest.LogCaptureFixture
) -> None:
    """Before any weight is fused."""
    spoilt = shutil.copytree(vector, tmp_path / "v")
    stored = tensors(spoilt)
    stored["model.norm.weight"][0] = float("nan")
    save_file(stored, spoilt / "vector.safetensors")
    error = expect(VectorCorruptError, family.target, engine_log, vector=str(spoilt), alpha=1)
    assert error.problems == ("model.norm.weight",)


def test_another_architecture_is_refused(
    family: Family, vector: Path, tmp_path: Path, engine_log: pytest.LogCaptureFixture
) -> None:
    """Even where names and shapes agree."""
    other = shutil.copytree(vector, tmp_path / "v")
    path = other / "vector.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "llama"}))
    expect(IncompatibleVectorError, family.target, engine_log, vector=str(other))


def test_a_pickle_target_is_refused(family: Family, vector: Path, tmp_path: Path) -> None:
    """The load format reads safetensors only; vLLM says that it finds none."""
    target = shutil.copytree(family.target, tmp_path / "target")
    torch.save({}, target / "pytorch_model.bin")
    (target / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"Cannot find any model weights"):
        load(target, "rvec", vector=str(vector))
