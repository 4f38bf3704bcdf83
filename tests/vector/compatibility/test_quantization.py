"""vllm_rvec.vector.compatibility.quantization: targets that were quantized beforehand."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.support.checkpoints import tensors
from tests.support.quantized import QUANTIZERS, quantized_copy
from tests.support.vectors import store_vector
from vllm_rvec.errors import CheckpointError, IncompatibleVectorError
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.compatibility import Report, Verdict, check_target
from vllm_rvec.vector.compatibility.quantization import (
    KEEPS_INPUTS,
    WAYS_OUT,
    declared_quantization,
)
from vllm_rvec.vector.merge import merge

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family


def check(vector: Path, target: Path) -> Report:
    return check_target(VectorReader(vector), target)


@pytest.mark.parametrize("method", QUANTIZERS)
@pytest.mark.parametrize("force", [False, True])
def test_a_quantized_target_is_refused_with_the_ways_out(
    family: Family, vector: Path, tmp_path: Path, method: str, force: bool
) -> None:
    """Whatever the layout, each quantized weight is named; no force gets past it."""
    target = quantized_copy(family.target, tmp_path / "target", method)
    with pytest.raises(IncompatibleVectorError) as caught:
        check(vector, target).raise_if_refused(force)
    error = caught.value
    projections = {name for name in tensors(vector) if name.endswith("_proj.weight")}
    assert {problem.split(":")[0] for problem in error.problems} == projections
    assert f"the target is quantized ({method})" in error.what
    assert error.fix == WAYS_OUT
    assert "--quantization" in error.fix
    assert "vllm-rvec merge" in error.fix
    assert "--mode dial" in error.fix


def test_integers_without_a_word_about_them_are_refused_alike(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """The dtypes say it where the configuration does not."""
    target = quantized_copy(family.target, tmp_path / "target", "fp8", only="1.mlp.up_proj")
    shutil.copy(family.target / "config.json", target)
    with pytest.raises(IncompatibleVectorError, match="changes 1 quantized tensors"):
        check(vector, target).raise_if_refused(force=True)


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_a_vector_beside_the_quantized_weights_can_be_forced(
    family: Family, vector: Path, tmp_path: Path, method: str
) -> None:
    """Attention alone, added to a model of which the rest is codes."""
    attention = {name: v for name, v in tensors(vector).items() if "self_attn" in name}
    part = store_vector(tmp_path / "v", attention, complete=False, model_type="qwen2")
    target = quantized_copy(family.target, tmp_path / "target", method, only=".mlp.")
    report = check(part, target)
    with pytest.raises(IncompatibleVectorError, match="rescale the tensors beside theirs"):
        report.raise_if_refused()
    assert "go on with --force" in str(caught_error(report))
    report.raise_if_refused(force=True)


def caught_error(report: Report) -> IncompatibleVectorError:
    with pytest.raises(IncompatibleVectorError) as caught:
        report.raise_if_refused()
    return caught.value


def test_tensors_that_a_vector_leaves_alone_may_be_codes(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """Stored as `zero`: the donors have them, nothing is added to them."""
    made: dict[str, object] = {
        name: v * 0 if "mlp" in name else v for name, v in tensors(vector).items()
    }
    part = store_vector(tmp_path / "v", made, encoding="auto")  # type: ignore[arg-type]
    entries = VectorReader(part).manifest.tensors
    assert {entries[name].encoding for name in entries if "mlp" in name} == {"zero"}
    for method in ("fp8", "gptq"):
        target = quantized_copy(family.target, tmp_path / method, method, only=".mlp.")
        report = check(part, target)
        assert report.levels[0].name == "quantization"
        report.raise_if_refused(force=True)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({}, ""),
        ({"quantization_config": None}, ""),
        ({"quantization_config": {}}, ""),
        ({"compression_config": {"quant_method": "sparseml"}}, "sparseml"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
        ({"quantization_config": {"producer": {"name": "modelopt"}}}, "modelopt"),
        ({"quantization_config": {"bits": 4}}, "by a method without a name"),
    ],
)
def test_where_a_checkpoint_says_it(config: dict[str, object], method: str) -> None:
    """The places where vLLM looks."""
    assert declared_quantization(config) == method


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json"])
def test_a_file_beside_the_configuration_counts(
    family: Family, vector: Path, tmp_path: Path, name: str
) -> None:
    """As ModelOpt and older quantizers write it."""
    target = quantized_copy(family.target, tmp_path / "target", "gptq")
    shutil.copy(family.target / "config.json", target)
    (target / name).write_text(json.dumps({"bits": 4}))
    with pytest.raises(IncompatibleVectorError, match="the target is quantized"):
        check(vector, target).raise_if_refused(force=True)


def test_a_forced_merge_into_codes_is_refused_too(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """Nothing is written."""
    target = quantized_copy(family.target, tmp_path / "target", "gptq")
    with pytest.raises(IncompatibleVectorError):
        merge(target, [vector], tmp_path / "merged", force=True)
    assert not (tmp_path / "merged").exists()


def test_gguf_is_named(vector: Path, tmp_path: Path) -> None:
    """A folder with nothing else in it."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"model-Q4_K_M\.gguf: llama\.cpp's format"):
        check(vector, tmp_path)


def test_an_unquantized_target_has_no_such_level(family: Family, vector: Path) -> None:
    """Three levels, as before."""
    report = check(vector, family.target)
    assert [level.name for level in report.levels] == ["structure", "tokenizer", "lineage"]
    assert report.verdict is not Verdict.REFUSE


@pytest.mark.parametrize("method", QUANTIZERS)
def test_a_dial_needs_inputs_that_were_not_rescaled(
    family: Family, vector: Path, tmp_path: Path, method: str
) -> None:
    """GPTQ, FP8 and others leave them alone; of AWQ and compressed-tensors only the user knows."""
    target = quantized_copy(family.target, tmp_path / "target", method)
    report = check_target(VectorReader(vector), target, is_beside=True)
    if method in KEEPS_INPUTS:
        report.raise_if_refused(force=False)
        assert report.levels[0].name == "quantization"
        return
    with pytest.raises(IncompatibleVectorError, match="AWQ and SmoothQuant"):
        report.raise_if_refused(force=False)
    report.raise_if_refused(force=True)


def test_beside_an_unquantized_target_nothing_is_different(family: Family, vector: Path) -> None:
    """Names and shapes are compared as ever."""
    reader = VectorReader(vector)
    assert check_target(reader, family.target, is_beside=True) == check_target(
        reader, family.target
    )
