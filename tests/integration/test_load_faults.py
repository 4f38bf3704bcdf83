"""What happens to a load half way: one rank fails, or somebody presses Ctrl-C.

The load is slow because the vector is: factors of full rank, decoded in float64.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import torch

from tests.support.processes import until
from tests.support.tiny_vectors import write_vector
from vllm_rvec.vector.encodings.parts import Encoded, in_memory
from vllm_rvec.vector.layout import LORA_A, LORA_B

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = pytest.mark.engine

SIZE = 2048
LAYERS = 4
BEGUN = "Vector and target: tokenizer"
"""What the loader logs just before the first tensor."""
ENDED = "Fused "


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target of 70 MB and a vector that takes a core several seconds, in a shard per layer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    work = tmp_path_factory.mktemp("slow")
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    model.to_empty(device="cpu").to(torch.bfloat16).save_pretrained(work / "target")
    factor = torch.zeros(SIZE, SIZE)
    parts = in_memory(LORA_A, factor), in_memory(LORA_B, factor)
    v = (SIZE, SIZE), Encoded("lowrank", "F32", parts, scaling=1.0, squared_norm=0.0)
    names = [
        f"model.layers.{layer}.self_attn.{which}_proj.weight"
        for layer in range(LAYERS)
        for which in "oq"
    ]
    vector = write_vector(
        work / "vector",
        dict.fromkeys(names, v),
        shard_bytes=2 * SIZE * SIZE * 4,
        complete=False,
        model_type="qwen2",
    )
    assert len(list(vector.glob("*.safetensors"))) == LAYERS
    return work / "target", vector


@contextmanager
def loading(
    slow: tuple[Path, Path], log: Path, flags: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """Run `serve` in a process group of its own until its engine is in the middle of the load."""
    target, vector = slow
    command = [
        *(sys.executable, "-m", "vllm_rvec.serve", "--port", "0", "--verbose"),
        *("--model", str(target), "--vector", str(vector), "--alpha", "0.5", "--"),
        *("--skip-tokenizer-init", "--enforce-eager", "--max-model-len", "128", *flags),
    ]
    ranks = "0|1" if flags else "auto"
    env = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ranks,
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=env, start_new_session=True
        )
    family: list[psutil.Process] = []
    try:

        def has_begun() -> bool:
            assert process.poll() is None, log.read_text()[-4000:]
            return log.read_text().count(BEGUN) >= (2 if flags else 1)

        until(has_begun, "the load has begun", 180)
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children(recursive=True)]
        assert ENDED not in log.read_text()
        yield process, family
    finally:
        for member in family:
            if member.is_running():
                member.kill()
        process.wait(30)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != "zombie"]


def has_mapped(process: int, name: str) -> bool:
    # Not psutil's way: it sums up every page, and the load goes on meanwhile.
    return name in Path(f"/proc/{process}/maps").read_text()


def test_one_failing_rank_ends_the_engine_and_the_command(
    slow: tuple[Path, Path], tmp_path: Path
) -> None:
    """Rank 1 alone can't open the next shard: its reason is shown, exit status 8, nothing left."""
    log = tmp_path / "log"
    with loading(slow, log, ("--tensor-parallel-size", "2")) as (process, family):
        (rank,) = {int(pid) for pid in re.findall(r"Worker_TP1 pid=(\d+)", log.read_text())}
        until(lambda: has_mapped(rank, "vector-00002-of"), "rank 1 is half way", 60)
        psutil.Process(rank).rlimit(psutil.RLIMIT_NOFILE, (3, 3))
        assert process.wait(60) == 8
        until(lambda: not alive(family), "every process is gone", 5)
    text = log.read_text()
    error = text[text.rindex("\nerror: ") :]
    assert "vector-00003-of-00004.safetensors" in error
    assert "Too many open files" in error
    assert len(error.splitlines()) < 25


@pytest.mark.parametrize("whom", ["the terminal's process group", "the command alone"])
def test_ctrl_c_in_the_middle_of_a_load(slow: tuple[Path, Path], tmp_path: Path, whom: str) -> None:
    """It stops as asked, with 0; no engine goes on loading."""
    log = tmp_path / "log"
    with loading(slow, log) as (process, family):
        assert len(family) > 3
        if whom == "the command alone":
            process.send_signal(signal.SIGINT)
        else:
            os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 0
        until(lambda: not alive(family), "every process is gone", 5)
    assert ENDED not in log.read_text()
