"""vllm_rvec.loader with multimodal targets: a language model's vector reaches the language part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.support.checkpoints import make_merged, make_vector, tensors
from tests.support.families import language_name, language_part
from tests.support.variations import with_tensors
from vllm_rvec.errors import IncompatibleVectorError
from vllm_rvec.vector.compatibility.check import check_target
from vllm_rvec.vector.compatibility.report import Verdict
from vllm_rvec.vector.merge import merge
from vllm_rvec.vector.reader import VectorReader

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family
    from tests.support.vllm_model import Loaded


def load(model: Path, load_format: str = "auto", **extra: Any) -> Loaded:
    # vLLM takes seconds to import; tests that are deselected should not pay.
    from tests.support.vllm_model import load_parameters

    return load_parameters(model, load_format, dtype="bfloat16", **extra)


def differing(one: Loaded, other: Loaded) -> set[str]:
    assert one.parameters.keys() == other.parameters.keys()
    return {
        name
        for name, parameter in one.parameters.items()
        if not torch.equal(parameter.view(torch.uint8), other.parameters[name].view(torch.uint8))
    }


@pytest.fixture(scope="module", params=["paligemma", "idefics3"])
def spoken(
    request: pytest.FixtureRequest,
    families: dict[str, Family],
    tmp_path_factory: pytest.TempPathFactory,
) -> Family:
    """Donors that are language models, and a multimodal target."""
    return language_part(families[request.param], tmp_path_factory.mktemp(request.param))


def test_a_language_models_vector_is_fused_into_the_language_part(
    spoken: Family, tmp_path: Path
) -> None:
    """Names differ by a prefix; what sees stays as it is, bit for bit."""
    vector = make_vector(spoken, tmp_path / "v")
    assert VectorReader(vector).manifest.complete
    reference = make_merged(spoken.target, vector, 0.3, tmp_path / "m", named=named)
    fused, merged = load(spoken.target, "rvec", vector=str(vector), alpha=0.3), load(reference)
    assert not differing(fused, merged)
    changed = differing(fused, load(spoken.target))
    heard = {name for name in fused.parameters if ".layers." in name and "vision" not in name}
    assert heard <= changed
    assert not {name for name in changed if "vision" in name}


def named(name: str) -> str:
    return language_name(name) or "nothing"


def test_check_and_merge_take_the_same_names(spoken: Family, tmp_path: Path) -> None:
    """The check warns that other parts get nothing; the merge has the reference's bits."""
    vector = make_vector(spoken, tmp_path / "v")
    report = check_target(VectorReader(vector), spoken.target)
    assert report.verdict is Verdict.WARN
    assert any("language part" in line for line in report.lines(Verdict.WARN))
    merge(spoken.target, [vector], tmp_path / "ours", alphas=[0.3])
    reference = make_merged(spoken.target, vector, 0.3, tmp_path / "m", named=named)
    ours = tensors(tmp_path / "ours")
    for name, tensor in tensors(reference).items():
        assert torch.equal(tensor.view(torch.uint8), ours[name].view(torch.uint8)), name


def test_a_layer_that_is_not_covered_is_refused(spoken: Family, tmp_path: Path) -> None:
    """A multimodal target may have more than its language part, not a longer language part."""
    stored = tensors(spoken.target)
    vector = make_vector(spoken, tmp_path / "v")
    deeper = {
        name.replace(".layers.1.", ".layers.2."): tensor.clone()
        for name, tensor in stored.items()
        if ".layers.1." in name and language_name(name)
    }
    assert deeper
    target = with_tensors(spoken.target, tmp_path / "deeper", stored | deeper)
    report = check_target(VectorReader(vector), target)
    with pytest.raises(IncompatibleVectorError) as refused:
        report.raise_if_refused(force=False)
    uncovered = [p for p in refused.value.problems if "does not cover it" in p]
    assert len(uncovered) == len(deeper)
