"""Greedy answers of engines in this process, one after the other, as JSON on the last line.

Run as `python -m tests.support.answers`, with the engines to start as a JSON list on stdin: each
the keywords of `vllm.LLM`. One process for all, because nine tenths of an engine's start are
imports.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from tests.support.vllm_model import register_class

__all__ = ["PROMPTS", "answer"]

PROMPTS = ([3, 5, 7, 11], [100, 200, 300, 400, 401, 402])

SMALL: dict[str, Any] = {
    "max_model_len": 64,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 16 << 20,
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "seed": 0,
}


def answer(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Start an engine, ask, and end it.

    Args:
        arguments: Keywords of `vllm.LLM`.

    Returns:
        For each prompt its tokens, and for each token the log-probabilities of the likeliest.
    """
    register_class(arguments["model"])
    engine = LLM(**(SMALL | arguments))
    how = SamplingParams(
        temperature=0, max_tokens=12, logprobs=3, detokenize=False, ignore_eos=True
    )
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    replies = engine.generate(prompts, how, use_tqdm=False)
    engine.llm_engine.engine_core.shutdown()
    del engine
    cleanup_dist_env_and_memory()
    return [_facts(reply.outputs[0]) for reply in replies]


def _facts(output: Any) -> dict[str, Any]:
    logprobs = [{t: float(v.logprob).hex() for t, v in one.items()} for one in output.logprobs]
    return {"tokens": list(output.token_ids), "logprobs": logprobs}


if __name__ == "__main__":
    # vLLM collects at every step of start and end, a quarter of a second each: as long as all else.
    gc.collect = lambda *_: 0
    found = [answer(arguments) for arguments in json.load(sys.stdin)]
    sys.stdout.write(json.dumps(found) + "\n")
