"""Speculative decoding in real vLLM: the target is fused, its draft is not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from tests.integration.conftest import DEMO
from tests.integration.test_lora import PROMPTS, greedy
from tests.support.checkpoints import make_merged, tensors
from tests.support.engines import IN_PROCESS, run_script
from tests.support.variations import made_dense

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine


def test_a_draft_in_the_targets_own_folder_is_not_fused(tmp_path: Path) -> None:
    """Answers are the fused model's; drafts come from the stored weights, and some are taken."""
    found = run_script(SPECULATIVE, tmp_path, str(DEMO), json.dumps(PROMPTS), **IN_PROCESS)
    answers, norms, accepted = found
    vector = made_dense(DEMO / "vector", tmp_path / "vector")
    fused = make_merged(DEMO / "target", vector, 1.0, tmp_path / "fused", torch.float32)
    assert answers == greedy(fused) != greedy(DEMO / "target")
    assert accepted > 0
    # Norms: what post-processing on a CPU leaves as it was loaded.
    for model, folder in (("target", fused), ("draft", DEMO / "target")):
        stored = tensors(folder)
        assert len(norms[model]) > 2
        for name, values in norms[model].items():
            assert torch.equal(torch.tensor(values), stored[name].float()), (model, name)


SPECULATIVE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    demo, prompts = sys.argv[1:]
    llm = LLM(
        demo + "/target",
        load_format="rvec",
        model_loader_extra_config={"vector": demo + "/vector", "alpha": 1.0},
        speculative_config={
            "method": "draft_model", "model": demo + "/target", "num_speculative_tokens": 3
        },
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        disable_log_stats=False,
    )
    out = llm.generate(json.loads(prompts), SamplingParams(temperature=0, max_tokens=24))
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    norms = {
        which: {
            name: parameter.data.tolist()
            for name, parameter in model.named_parameters()
            if name.endswith("norm.weight")
        }
        for which, model in (("target", runner.model), ("draft", runner.drafter.model))
    }
    (accepted,) = [
        metric.value
        for metric in llm.get_metrics()
        if metric.name == "vllm:spec_decode_num_accepted_tokens"
    ]
    print(json.dumps([[list(o.outputs[0].token_ids) for o in out], norms, accepted]))
"""
