"""What the dial overrides of vLLM's, which is not its public interface: it must still be there.

A new release fails here first, before any engine. Tested with vLLM 0.32.0. The seam that would make
this unnecessary: per-request inputs of a model runner (in vLLM's second runner, `ModelState`).
"""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request
from vllm.v1.sample.logits_processor import validate_logits_processors_parameters
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

TAKES = {
    "_prepare_inputs": ["self", "scheduler_output", "num_scheduled_tokens"],
    "_get_prompt_logprobs_dict": ["self", "hidden_states", "num_scheduled_tokens"],
    "_dummy_sampler_run": ["self", "hidden_states"],
}


@pytest.mark.parametrize("name", TAKES)
def test_the_runner_has_what_is_overridden(name: str) -> None:
    """By name, and by what it takes."""
    assert list(inspect.signature(getattr(GPUModelRunner, name)).parameters) == TAKES[name]


def test_a_dummy_run_can_be_one_that_measures() -> None:
    """`num_tokens` first, `is_profile` by name."""
    parameters = list(inspect.signature(GPUModelRunner._dummy_run).parameters)
    assert parameters[:2] == ["self", "num_tokens"]
    assert "is_profile" in parameters


def test_the_worker_and_the_scheduler_have_what_is_overridden() -> None:
    """The methods of the worker's start, and where requests come in."""
    for name in ("init_device", "load_model", "determine_available_memory"):
        assert callable(getattr(Worker, name))
    assert list(inspect.signature(Scheduler.add_request).parameters) == ["self", "request"]
    assert callable(Request.update_block_hashes)
    assert callable(validate_logits_processors_parameters)


def test_the_platforms_runner_is_what_its_worker_makes() -> None:
    """In a process of its own: vLLM's CPU worker changes the process that imports it."""
    code = (
        "from vllm_rvec.loader.dial import vllm_workers as w\n"
        "import inspect\n"
        "source = inspect.getsource(w.PlatformWorker.init_device)\n"
        "assert w.PlatformRunner.__name__ in source\n"
        "from vllm_rvec.loader.dial.worker import DialModelRunner as r\n"
        "names = [c.__name__ for c in r.__mro__[:3]]\n"
        "assert names[1:] == ['DialRunner', w.PlatformRunner.__name__], names\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
