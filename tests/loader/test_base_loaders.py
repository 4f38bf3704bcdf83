"""vllm_rvec.loader.base_loaders: the target through vLLM's other loaders, the draft past ours."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.support.checkpoints import make_checkpoint, tensors
from tests.support.variations import with_tensors
from vllm_rvec.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family
    from tests.support.vllm_model import Loaded


def load(model: Path, load_format: str = "auto", **extra: Any) -> Loaded:
    # vLLM takes seconds to import; tests that are deselected should not pay.
    from tests.support.vllm_model import load_parameters

    return load_parameters(model, load_format, **extra)


def assert_same(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], *, differ: bool = False
) -> None:
    assert ours.keys() == theirs.keys()
    assert all(parameter.numel() for parameter in ours.values())
    equal = [
        torch.equal(parameter.view(torch.uint8), theirs[name].view(torch.uint8))
        for name, parameter in ours.items()
    ]
    assert not any(equal) if differ else all(equal)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_runai_streamer_gives_the_same_sum(family: Family, vector: Path, alpha: float) -> None:
    """Its own keys go through; every parameter is that of the default, bit for bit."""
    streamed = load(
        family.target,
        "rvec",
        vector=str(vector),
        alpha=alpha,
        base_format="runai_streamer",
        concurrency=2,
        memory_limit=1 << 20,
    )
    assert type(streamed.loader.base).__name__ == "RunaiModelStreamerLoader"
    assert streamed.loader.stream.is_complete
    default = load(family.target, "rvec", vector=str(vector), alpha=alpha)
    assert_same(streamed.parameters, default.parameters)


def test_a_wrong_value_of_the_base_loader_is_its_own_error(family: Family, vector: Path) -> None:
    """What the other loader says of its keys is not hidden."""
    with pytest.raises(ValueError, match="concurrency must be a positive integer"):
        load(
            family.target,
            "rvec",
            vector=str(vector),
            base_format="runai_streamer",
            concurrency=0,
        )


def test_a_missing_package_is_named(
    family: Family, vector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the command that installs it, not vLLM's failure to find its own name."""
    monkeypatch.setitem(sys.modules, "runai_model_streamer", None)
    with pytest.raises(ConfigError, match="pip install runai-model-streamer"):
        load(family.target, "rvec", vector=str(vector), base_format="runai_streamer")


@pytest.mark.parametrize("base_format", ["fastsafetensors", "instanttensor"])
def test_loaders_of_device_memory_are_refused_without_one(
    family: Family, vector: Path, base_format: str
) -> None:
    """VLLM names them a CUDA device whatever there is."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda_alike():
        pytest.skip("there is such a device: see tests/gpu")
    with pytest.raises(ConfigError, match=f"{base_format} needs a CUDA device"):
        load(family.target, "rvec", vector=str(vector), base_format=base_format)


def test_vllms_own_look_at_what_was_loaded_stays(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """A target that lacks a tensor is refused by vLLM too, where our refusal is forced."""
    stored = tensors(family.target)
    del stored["model.layers.1.input_layernorm.weight"]
    target = with_tensors(family.target, tmp_path / "target", stored)
    with pytest.raises(ValueError, match=r"not initialized from checkpoint: .*1\.input_layernorm"):
        load(target, "rvec", vector=str(vector), force=True)


def drafted(target: Path, draft: Path, extra: dict[str, object]) -> Loaded:
    """Load the draft model of an engine's configuration, as vLLM's runner does."""
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import get_draft_load_config

    from tests.support.vllm_model import CreatedModel, engine_config

    speculative = {
        "method": "draft_model",
        "model": str(draft),
        "num_speculative_tokens": 2,
    }
    config = engine_config(target, "rvec", extra, "bfloat16", speculative_config=speculative)
    loader: Any = get_model_loader(get_draft_load_config(config))
    draft_config = config.speculative_config.draft_model_config
    return CreatedModel(config, draft_config).loaded_by(loader)


@pytest.mark.parametrize("which", ["another", "the target's own folder"])
def test_a_draft_is_loaded_as_without_us(
    family: Family, vector: Path, tmp_path: Path, which: str
) -> None:
    """Same names, same shapes, even the same files: only the model named as the target is fused."""
    other = make_checkpoint(tmp_path / "draft", seed=0, noise=0.02, noise_seed=3)
    draft = other if which == "another" else family.target
    made = drafted(family.target, draft, {"vector": str(vector)})
    assert made.loader.stream is None
    assert_same(made.parameters, load(draft).parameters)
    fused = load(family.target, "rvec", vector=str(vector))
    assert_same(made.parameters, fused.parameters, differ=True)


def test_a_draft_may_be_of_files_that_a_target_may_not(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """A pickled draft is vLLM's business; the target's loader and its keys are not the draft's."""
    draft = shutil.copytree(family.base, tmp_path / "draft")
    torch.save(tensors(draft), draft / "pytorch_model.bin")
    (draft / "model.safetensors").unlink()
    extra: dict[str, object] = {
        "vector": str(vector),
        "base_format": "runai_streamer",
        "concurrency": 2,
    }
    assert_same(drafted(family.target, draft, extra).parameters, load(family.base).parameters)


def test_a_draft_that_names_our_loader_is_refused(family: Family, vector: Path) -> None:
    """Neither fused nor silently left alone."""
    from vllm.model_executor.model_loader import get_model_loader

    from tests.support.vllm_model import engine_config

    ours = {"load_format": "rvec", "model_loader_extra_config": {"vector": str(vector)}}
    speculative = {
        "method": "draft_model",
        "model": str(family.base),
        "num_speculative_tokens": 2,
        "draft_load_config": ours,
    }
    config = engine_config(family.target, "auto", {}, "bfloat16", speculative_config=speculative)
    draft = config.speculative_config.draft_model_config
    loader = get_model_loader(config.speculative_config.draft_load_config)
    with pytest.raises(ConfigError, match="draft_load_config can't be rvec"):
        loader.load_model(config, draft)
