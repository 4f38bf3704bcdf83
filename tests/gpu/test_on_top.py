"""On a GPU: online quantization of the sum, and loaders that stream into device memory."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.integration.conftest import DEMO
from tests.support.checkpoints import make_merged
from tests.support.engines import run_script
from tests.support.variations import made_dense

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

FUSED = {
    "load_format": "rvec",
    "model_loader_extra_config": {"vector": str(DEMO / "vector"), "alpha": 0.3},
}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sum on disk, in the serving dtype."""
    work = tmp_path_factory.mktemp("merged")
    vector = made_dense(DEMO / "vector", work / "vector")
    return make_merged(DEMO / "target", vector, 0.3, work / "model", torch.bfloat16)


def digests(folder: Path, model: Path, options: Mapping[str, Any]) -> dict[str, str]:
    """Start an engine, and digest every tensor that it holds."""
    found: dict[str, str] = run_script(SCRIPT, folder, str(model), json.dumps(options))
    return found


@pytest.mark.parametrize("quantization", ["fp8_per_tensor", "fp8_per_channel", "fp8_per_block"])
def test_the_sum_is_what_is_quantized(merged: Path, tmp_path: Path, quantization: str) -> None:
    """Every code and scale is that of the merged checkpoint."""
    online = {"quantization": quantization}
    fused = digests(tmp_path, DEMO / "target", FUSED | online)
    assert fused == digests(tmp_path, merged, online)
    assert fused != digests(tmp_path, DEMO / "target", online)


@pytest.mark.parametrize("base_format", ["fastsafetensors", "instanttensor"])
def test_tensors_that_stream_into_device_memory_are_fused_alike(
    merged: Path, tmp_path: Path, base_format: str
) -> None:
    """Bit for bit what the default gives."""
    pytest.importorskip(base_format)
    extra = {**FUSED["model_loader_extra_config"], "base_format": base_format}  # type: ignore[dict-item]
    fused = digests(tmp_path, DEMO / "target", FUSED | {"model_loader_extra_config": extra})
    assert fused == digests(tmp_path, merged, {})


SCRIPT = """
import json, sys
from vllm import LLM

if __name__ == "__main__":
    model, options = sys.argv[1:]
    llm = LLM(
        model,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        gpu_memory_utilization=0.2,
        **json.loads(options),
    )
    (found,) = llm.collective_rpc("compute_weight_checksums")
    print(json.dumps(found))
"""
