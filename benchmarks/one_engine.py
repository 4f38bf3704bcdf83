"""One vLLM engine in a process of its own: a child of the benchmarks that compare several.

    python -m benchmarks.one_engine '{"target": DIR, "dtype": "float32", "extra": {...}, ...}'

It starts the engine, answers one short request, and prints a JSON line of how long the start took
and what the process holds. Then each line on stdin is a batch, and each line on stdout its answer.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

WARM_UP = {"prompts": [[3, 5]], "alphas": [1.0], "new_tokens": 2, "has_logprobs": False}


def main() -> None:
    """Start, say so, answer until stdin ends."""
    asked = json.loads(sys.argv[1])
    is_dial = asked["extra"].get("mode") == "dial"
    Path(asked["target"]).resolve(strict=True)  # before the imports, which take seconds
    from vllm import LLM  # noqa: F401 - its imports are not the engine's start

    started = time.perf_counter()
    engine = _engine(asked, is_dial=is_dial)
    load_seconds = time.perf_counter() - started
    _answer(engine, WARM_UP, is_dial=is_dial)
    _say({"load_seconds": load_seconds, "private_bytes": _held_bytes()})
    for line in sys.stdin:
        _say(_answer(engine, json.loads(line), is_dial=is_dial))


def _engine(asked: dict[str, Any], *, is_dial: bool) -> Any:
    from vllm import LLM

    return LLM(
        asked["target"],
        dtype=asked["dtype"],
        max_model_len=asked["most_tokens"],
        max_num_batched_tokens=asked["most_batched_tokens"],
        kv_cache_memory_bytes=asked["cache_bytes"],
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **_loading(asked["extra"], is_dial=is_dial),
    )


def _loading(extra: dict[str, Any], *, is_dial: bool) -> dict[str, Any]:
    """Return the keywords in which kinds of engines differ."""
    if is_dial:
        from vllm_rvec.loader.dial.parts import dial_arguments

        return dial_arguments(**extra)
    load_format = "rvec" if extra else "safetensors"
    return {"load_format": load_format, "model_loader_extra_config": extra}


def _answer(engine: Any, batch: dict[str, Any], *, is_dial: bool) -> dict[str, Any]:
    """Return the greedy tokens of each prompt, and their logarithmic probabilities if asked."""
    from vllm import SamplingParams

    greedy = [
        SamplingParams(
            temperature=0,
            max_tokens=batch["new_tokens"],
            ignore_eos=True,
            detokenize=False,
            logprobs=0 if batch["has_logprobs"] else None,
            extra_args={"alpha": alpha} if is_dial else None,
        )
        for alpha in batch["alphas"]
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt in batch["prompts"]]
    answers = engine.generate(prompts, greedy, use_tqdm=False)
    outputs = [answer.outputs[0] for answer in answers]
    return {
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [
            [place[token].logprob for token, place in zip(output.token_ids, found, strict=True)]
            for output in outputs
            if (found := output.logprobs)
        ],
    }


def _held_bytes() -> int:
    """Return this process's anonymous memory: no mapped files, nor what was freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def _say(facts: dict[str, Any]) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
