"""Tokens a second of an engine whose weights were fused at load, beside a plainly loaded one.

Run by `make bench`; alone: `python -m benchmarks.engine_speed`. Two real vLLM engines stay up side
by side, one loading target and vector, the other the same weights merged to disk. They generate in
turn; their greedy answers must be equal, so both do the same work. Nothing of the vector is left
after a load, so the ratio is 1 but for the machine's noise.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from typing import TYPE_CHECKING, Any

from benchmarks.frame import Row, ratios, run
from benchmarks.loading import Way

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.files import Files

__all__ = ["measure"]

REPEATS = 5
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 16, 12


def measure(files: Files, repeats: int | None = None) -> list[Row]:
    """Compare the two engines."""
    from vllm_rvec.vector.merge import merge

    merged, vector = files.folder / "merged", files.vector("dense")
    merge(files.target, [vector], merged)
    try:
        engines = [_engine(files.target, Way.fused(vector)), _engine(merged, Way())]
        rounds = [
            [_generate(engine) for engine in engines] for _ in range(1 + (repeats or REPEATS))
        ]
    finally:
        shutil.rmtree(merged)
    if any(own[1] != other[1] for own, other in rounds):
        raise RuntimeError("the two engines answered differently: they don't hold one model")
    fused, plain = ([seconds for seconds, _ in side] for side in zip(*rounds[1:], strict=True))
    speeds = [PROMPTS * NEW_TOKENS / statistics.median(side) for side in (fused, plain)]
    return [
        Row(
            "tokens/s, fused engine / plain engine",
            # Seconds for the same tokens: turned round, they are tokens a second.
            **ratios(plain, fused),
            goal=1.0,
            limit="1",
            at_least=True,
            note="{:.0f} / {:.0f} tokens/s".format(*speeds),
        )
    ]


def _engine(model: Path, way: Way) -> Any:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    return LLM(
        str(model),
        load_format=way.load_format,
        model_loader_extra_config=way.extra,
        dtype="bfloat16",
        max_model_len=128,
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )


def _generate(engine: Any) -> tuple[float, list[list[int]]]:
    """Return the seconds it took, and the tokens."""
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [(7 * place + 11 * number) % 251 for place in range(PROMPT_TOKENS)]}
        for number in range(PROMPTS)
    ]
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    answers = engine.generate(prompts, greedy, use_tqdm=False)
    seconds = time.perf_counter() - started
    tokens = [list(answer.outputs[0].token_ids) for answer in answers]
    return seconds, tokens


if __name__ == "__main__":
    run(measure, __doc__)
