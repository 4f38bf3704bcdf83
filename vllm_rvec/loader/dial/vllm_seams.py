"""The names of vLLM's that the dial's scheduler and admission are made of.

Beside `vllm_api`, which every process of an engine imports: these are for those that need them.
Tested with vLLM 0.32.0; `tests/loader/dial/test_vllm_seams.py` fails where they move.
"""

from vllm import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request
from vllm.v1.sample.logits_processor.interface import LogitsProcessor

__all__ = ["AsyncScheduler", "LogitsProcessor", "Request", "SamplingParams", "Scheduler"]
