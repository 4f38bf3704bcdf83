"""Sleep and wake on a GPU: v survives both levels, and a change of alpha before them.

vLLM's CPU build takes no part in sleep mode; tests/loader/test_reload.py shows there what the wake
from level 2 does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.integration.conftest import DEMO
from tests.support.engines import run_script

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Digests and answers of one engine, step by step."""
    return run_script(SCRIPT, tmp_path_factory.mktemp("sleep"), str(DEMO))


def test_level_1_keeps_the_vector(digests: Any) -> None:
    """Weights go to the host and come back."""
    assert digests["after level 1"] == digests["at alpha 0.5"]


def test_level_2_keeps_the_vector(digests: Any) -> None:
    """Weights are discarded, and `reload_weights` fuses them anew."""
    assert digests["after level 2"] == digests["at alpha 0.5"]


def test_a_changed_alpha_survives_level_2(digests: Any) -> None:
    """The wake reads the alpha that was changed to, not the one of the start."""
    assert digests["at alpha 1"] != digests["at alpha 0.5"]
    assert digests["after level 2, at alpha 1"] == digests["at alpha 1"]


def test_a_change_back_leaves_no_trace(digests: Any) -> None:
    """Digests and answers are those of the start."""
    assert digests["back at alpha 0.5"] == digests["at alpha 0.5"]


SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    demo = sys.argv[1]
    extra = {"vector": demo + "/vector", "alpha": 0.5}
    llm = LLM(
        demo + "/target",
        load_format="rvec",
        model_loader_extra_config=extra,
        worker_extension_cls="vllm_rvec.loader.worker.RvecWorker",
        enable_sleep_mode=True,
        enforce_eager=True,
        max_model_len=256,
        gpu_memory_utilization=0.2,
    )
    sampling = SamplingParams(temperature=0, max_tokens=24)

    def look():
        (out,) = llm.generate(["Leo has 60 apples. Gets 2. Gives 7. How many?"], sampling)
        return [llm.collective_rpc("compute_weight_checksums"), out.outputs[0].text]

    def sleep_and_wake():
        llm.sleep(level=2)
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])

    def change(alpha):
        llm.collective_rpc("rvec_reload", args=(extra | {"alpha": alpha},))
        llm.reset_prefix_cache()

    llm.collective_rpc("rvec_note_files")
    seen = {"at alpha 0.5": look()}
    llm.sleep(level=1)
    llm.wake_up()
    seen["after level 1"] = look()
    sleep_and_wake()
    seen["after level 2"] = look()
    change(1.0)
    seen["at alpha 1"] = look()
    sleep_and_wake()
    seen["after level 2, at alpha 1"] = look()
    change(0.5)
    seen["back at alpha 0.5"] = look()
    print(json.dumps(seen))
"""
