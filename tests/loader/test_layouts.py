"""vllm_rvec.loader on ranks of parallel layouts: each adds to what it holds, and to nothing else.

Real ranks, two processes that meet by gloo; what engines of these layouts answer is in
tests/integration/test_layouts.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.checkpoints import make_merged, make_vector
from tests.support.families import KINDS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family

    Reports = dict[str, list[dict[str, Any]]]
    """What each rank says, by case."""

SPLIT = ("qwen2", "gemma3", "llama-biases", "phi3", "olmo2", "mixtral", "deepseek-v2", "gpt-oss")
EXPERTS = ("qwen3-moe", "mixtral", "deepseek-v3")
STAGED = ("qwen2-tied", "gemma2", "phi3", "qwen3-moe")

THETA_BYTES, VECTOR_BYTES, PARAMETER_BYTES = 2, 4, 2
"""bfloat16 target and parameters, float32 vector."""


def run_ranks(folder: Path, layout: dict[str, Any], cases: dict[str, Any]) -> Reports:
    """Run two ranks side by side."""
    work = json.dumps({"layout": layout, "cases": cases})
    command = [sys.executable, "-m", "tests.support.rank"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), "2", str(folder / "store")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING"},
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.write(work)
            rank.stdin.close()
            rank.stdin = None
        said = [rank.communicate(timeout=200) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for rank, (_, error) in zip(ranks, said, strict=True):
        assert rank.returncode == 0, error[-4000:]
    found = [json.loads(output.splitlines()[-1]) for output, _ in said]
    return {name: [report[name] for report in found] for name in cases}


def make_case(family: Family, folder: Path, **arguments: Any) -> dict[str, Any]:
    folder.mkdir()
    vector = make_vector(family, folder / "vector")
    merged = make_merged(family.target, vector, 0.3, folder / "merged")
    return {
        "target": str(family.target),
        "merged": str(merged),
        "extra": {"vector": str(vector), "alpha": 0.3},
        "arguments": arguments,
    }


@pytest.fixture(scope="module")
def split(families: dict[str, Family], tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """Tensor parallel 2, and experts whole on one of two ranks."""
    folder = tmp_path_factory.mktemp("split")
    cases = {kind: make_case(families[kind], folder / kind) for kind in SPLIT}
    for kind in EXPERTS:
        for suffix, filtered in (("experts", False), ("filtered", True)):
            cases[f"{kind} {suffix}"] = make_case(
                families[kind],
                folder / f"{kind}-{suffix}",
                enable_expert_parallel=True,
                enable_ep_weight_filter=filtered,
            )
    return run_ranks(folder, {"tensor_parallel_size": 2}, cases)


@pytest.fixture(scope="module")
def staged(families: dict[str, Family], tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """Pipeline parallel 2."""
    folder = tmp_path_factory.mktemp("staged")
    cases = {kind: make_case(families[kind], folder / kind) for kind in STAGED}
    return run_ranks(folder, {"pipeline_parallel_size": 2}, cases)


def touched_bytes(report: dict[str, Any]) -> int:
    """Return what a rank read of target and vector, and wrote."""
    added: int = report["added"]
    return added * (THETA_BYTES + VECTOR_BYTES + PARAMETER_BYTES)


def assert_own_part_only(report: dict[str, Any], early: frozenset[str] = frozenset()) -> None:
    assert report["differing"] == []
    assert set(report["early"]) == early
    if not early:
        held_bytes = report["held"] * PARAMETER_BYTES
        assert touched_bytes(report) * PARAMETER_BYTES == held_bytes * (
            THETA_BYTES + VECTOR_BYTES + PARAMETER_BYTES
        )


@pytest.mark.parametrize("kind", SPLIT)
def test_each_rank_of_two_fuses_its_slices_and_no_more(split: Reports, kind: str) -> None:
    """Bit for bit a merged checkpoint's slices; every element that is held is added once."""
    for report in split[kind]:
        assert_own_part_only(report, KINDS[kind].early)
    assert split[kind][0]["names"] == split[kind][1]["names"]


@pytest.mark.parametrize("how", ["experts", "filtered"])
@pytest.mark.parametrize("kind", EXPERTS)
def test_each_rank_fuses_its_own_experts_only(split: Reports, kind: str, how: str) -> None:
    """With `--enable-expert-parallel`, and with `--enable-ep-weight-filter` on top."""
    for report in split[f"{kind} {how}"]:
        assert_own_part_only(report)


@pytest.mark.parametrize("kind", STAGED)
def test_each_stage_fuses_its_own_layers_only(staged: Reports, kind: str) -> None:
    """The first has the embedding and layer 0, the last layer 1, norm and head."""
    for report, own, other in zip(
        staged[kind], ("layers.0.", "layers.1."), ("1.", "0."), strict=True
    ):
        assert_own_part_only(report)
        layers = [name for name in report["names"] if "layers." in name]
        assert layers
        assert all(own in name and f"layers.{other}" not in name for name in layers)
