"""Adapters in real vLLM with `--enable-lora`: an exported vector, and on top of a fused target."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from tests.integration.conftest import DEMO
from tests.support.checkpoints import make_merged, tensors
from tests.support.engines import IN_PROCESS, run_script
from tests.support.variations import made_dense
from vllm_rvec.vector.lora.exporting import export_lora

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

RANK = 8
PROMPTS = [
    "Start with 46.",
    "Start with 12. Add 30. Take 4. Add 3. What is",
]
"""Cut short: the demo ends at once where it isn't asked as in a chat."""


def merge_product(base: Path, adapter: Path, folder: Path) -> Path:
    """Merge B @ A to disk in float32, without the package's own code."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    factors, merged = tensors(adapter), {}
    for name, theta in tensors(base).items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        merged[name] = theta.float()
        if f"{module}.lora_A.weight" in factors:
            merged[name] += factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
    save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def greedy(folder: Path) -> list[list[int]]:
    """Answer by transformers, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            out = model.generate(ids, max_new_tokens=24, do_sample=False)
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


def served(folder: Path, adapter: Path, options: dict[str, object]) -> list[list[list[int]]]:
    """Answer by vLLM: without and with the adapter, and both again after a reload."""
    arguments = str(DEMO / "target"), str(adapter), json.dumps(options), json.dumps(PROMPTS)
    answers: list[list[list[int]]] = run_script(SERVED, folder, *arguments, **IN_PROCESS)
    return answers


def test_vllm_serves_the_exported_adapter(tmp_path: Path) -> None:
    """Greedy tokens are those of the model with the same product merged, not the base's."""
    made = export_lora(DEMO / "vector", tmp_path / "adapter", rank=RANK)
    assert made.scaling == 1
    merged = merge_product(DEMO / "target", made.output, tmp_path / "merged")
    base, adapted = served(tmp_path, made.output, {})
    assert base == greedy(DEMO / "target")
    assert adapted == greedy(merged)
    assert adapted != base


def test_an_adapter_on_top_of_a_fused_target(tmp_path: Path) -> None:
    """Base requests get the fused model, adapter requests that and the adapter; also reloaded."""
    adapter = export_lora(DEMO / "vector", tmp_path / "adapter", rank=RANK).output
    vector = made_dense(DEMO / "vector", tmp_path / "vector")
    fused = make_merged(DEMO / "target", vector, -1.0, tmp_path / "fused", torch.float32)
    both = merge_product(fused, adapter, tmp_path / "both")
    extra = {"vector": str(DEMO / "vector"), "alpha": -1.0}
    base, adapted, base_again, adapted_again = served(
        tmp_path,
        adapter,
        {"load_format": "rvec", "model_loader_extra_config": extra, "enable_prefix_caching": False},
    )
    assert base == greedy(fused) != greedy(DEMO / "target")
    assert adapted == greedy(both) != base
    assert (base_again, adapted_again) == (base, adapted)


SERVED = f"""
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    model, adapter, options, prompts = sys.argv[1:]
    options = json.loads(options)
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        enable_lora=True,
        max_lora_rank={RANK},
        **options,
    )
    sampling = SamplingParams(temperature=0, max_tokens=24)
    answers = []
    for reload in (False, True) if options else (False,):
        if reload:
            llm.collective_rpc("reload_weights")
        for request in (None, LoRARequest("rvec", 1, adapter)):
            out = llm.generate(json.loads(prompts), sampling, lora_request=request)
            answers.append([list(o.outputs[0].token_ids) for o in out])
    print(json.dumps(answers))
"""
