"""Engines on two ranks: fused at load, each answers as a merged checkpoint in that layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.checkpoints import make_merged, make_vector
from tests.support.engines import answers

if TYPE_CHECKING:
    from tests.support.checkpoints import Family

pytestmark = pytest.mark.engine

ALPHA = 0.3

# Expert parallel is compared in tests/loader/test_layouts.py only: with it, a worker of the CPU
# build of vLLM 0.32 dies of a segmentation fault at the first prompt, without our loader too.
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor parallel": {"tensor_parallel_size": 2},
    # In eager mode that build makes no room for what one stage hands to the next.
    "pipeline parallel": {
        "pipeline_parallel_size": 2,
        "enforce_eager": False,
        "compilation_config": {"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"},
    },
}


@pytest.fixture(scope="module")
def replies(
    families: dict[str, Family], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Any]]:
    """What a mixture of experts answers in each layout, merged and fused, by worker processes."""
    folder, family = tmp_path_factory.mktemp("layouts"), families["qwen3-moe"]
    vector = make_vector(family, folder / "vector")
    merged = make_merged(family.target, vector, ALPHA, folder / "merged")
    extra = {"vector": str(vector), "alpha": ALPHA}
    fused = {"load_format": "rvec", "model_loader_extra_config": extra}
    common = {"dtype": "bfloat16", "distributed_executor_backend": "mp"}
    engines: list[dict[str, Any]] = []
    for layout in LAYOUTS.values():
        engines.append(common | layout | {"model": str(merged)})
        engines.append(common | layout | fused | {"model": str(family.target)})
    found = iter(answers(engines, VLLM_CPU_OMP_THREADS_BIND="0|1"))
    return {name: [next(found) for _ in range(2)] for name in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_answer_as_two_of_a_merged_engine(
    replies: dict[str, list[Any]], layout: str
) -> None:
    """Greedy tokens and their log-probabilities, bit for bit."""
    merged, fused = replies[layout]
    assert [len(reply["tokens"]) for reply in fused] == [12, 12]
    assert fused == merged
