"""Answers of dial engines and others in this process, as JSON on the last line.

Run as `python -m tests.support.dial_answers`, with a JSON list of jobs on stdin: each `engine`, the
keywords of `vllm.LLM`, and `requests`, each `prompt` (token ids), `alpha` (None where there is
none) and more keywords of `SamplingParams`; or `fails`, where the engine should not start.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import TYPE_CHECKING, Any

from tests.support.engines import run_json

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["dial", "refusals", "run_jobs"]

SECONDS = 600
OWN = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # prompts of more than one block; rotary positions
}
"""Environment variables of the process."""

SMALL: dict[str, Any] = {
    "max_model_len": 64,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 2048,
    "kv_cache_memory_bytes": 16 << 20,
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
    "seed": 0,
}


def dial(**extra: Any) -> dict[str, Any]:
    """The keywords of a dial engine, with `extra` for the loader."""
    return {"dial": extra}


def refusals(engines: Sequence[dict[str, Any]]) -> list[str]:
    """Start engines in a process of their own, one after the other, which all should fail.

    Args:
        engines: For each the keywords, as above.

    Returns:
        What each failed with: its type, and all that it says; empty where it started.
    """
    found: list[str] = run_json(
        "tests.support.dial_answers",
        [{"engine": one, "fails": True} for one in engines],
        OWN,
        SECONDS,
    )
    return found


def run_jobs(jobs: Sequence[dict[str, Any]], **env: str) -> list[list[dict[str, Any]]]:
    """Run jobs in a process of their own, one engine after the other.

    Args:
        jobs: As above; also `batch`, how many requests are sent at a time, `alone`, how many of the
            last are sent each by itself, and `counts_preemptions`.
        env: Environment variables for the process.

    Returns:
        For each job and each of its requests: `tokens`, a list for each of its `n` answers,
        `logprobs` of these, `prompt_logprobs`, `cached`, the number of cached tokens, and
        `preempted`, of the whole engine where it was asked for.
    """
    found: list[list[dict[str, Any]]] = run_json(
        "tests.support.dial_answers", list(jobs), {**OWN, **env}, SECONDS
    )
    return found


def _started(keywords: dict[str, Any]) -> Any:
    from vllm import LLM

    from vllm_rvec.loader.dial.parts import dial_arguments

    arguments = SMALL | keywords
    if (extra := arguments.pop("dial", None)) is not None:
        arguments = dial_arguments(**extra) | arguments
    return LLM(**arguments)


def _failure(keywords: dict[str, Any]) -> str:
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        _started(keywords)
    except Exception as exc:  # noqa: BLE001 - whatever it is, the test reads it
        return f"{type(exc).__name__}: {exc}"
    finally:
        cleanup_dist_env_and_memory()
    return ""


def _run(job: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = _started(job["engine"])
    prompts, params = [], []
    for request in job["requests"]:
        rest = dict(request)
        prompts.append({"prompt_token_ids": rest.pop("prompt")})
        alpha = rest.pop("alpha")
        own = None if alpha is None else {"alpha": alpha}
        given = {"temperature": 0, "max_tokens": 10, "logprobs": 1, "ignore_eos": True} | rest
        params.append(SamplingParams(extra_args=own, detokenize=False, **given))
    # One batch after the other where the job says so; else all at once.
    replies = [
        reply
        for batch in _batches(list(zip(prompts, params, strict=True)), job)
        for reply in engine.generate(*map(list, zip(*batch, strict=True)), use_tqdm=False)
    ]
    preempted = _preempted(engine) if job.get("counts_preemptions") else 0
    engine.llm_engine.engine_core.shutdown()
    del engine
    cleanup_dist_env_and_memory()
    return [_facts(reply) | {"preempted": preempted} for reply in replies]


def _batches(requests: list[Any], job: dict[str, Any]) -> list[list[Any]]:
    together = len(requests) - job.get("alone", 0)
    size = job.get("batch") or together or 1
    batches = [requests[at : min(at + size, together)] for at in range(0, together, size)]
    return [*batches, *([request] for request in requests[together:])]


def _preempted(engine: Any) -> int:
    return sum(int(m.value) for m in engine.get_metrics() if m.name == "vllm:num_preemptions")


def _facts(reply: Any) -> dict[str, Any]:
    scored = reply.prompt_logprobs
    return {
        "tokens": [list(one.token_ids) for one in reply.outputs],
        "logprobs": [
            [step[t].logprob for step, t in zip(one.logprobs, one.token_ids, strict=True)]
            for one in reply.outputs
        ],
        "prompt_logprobs": scored
        and [None if step is None else next(iter(step.values())).logprob for step in scored],
        "cached": reply.num_cached_tokens,
    }


if __name__ == "__main__":
    # vLLM collects at every step of start and end, a quarter of a second each: as long as all else.
    gc.collect = lambda *_: 0
    found = [
        _failure(job["engine"]) if job.get("fails") else _run(job) for job in json.load(sys.stdin)
    ]
    sys.stdout.write(json.dumps(found) + "\n")
