"""Start `one_engine` children: engines that answer when told, alone or several at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

__all__ = ["Answers", "Batch", "Engine", "Setup", "answer_at_once", "started"]

ENVIRONMENT = {
    # One process is the whole engine, so its memory is the engine's.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # A dial needs the first one; so all have it.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}


@dataclass(frozen=True, slots=True)
class Setup:
    """What engines of one run have in common."""

    dtype: str
    most_tokens: int
    """Of a request."""
    most_batched_tokens: int
    """Of a step."""
    cache_bytes: int = 1 << 26


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that are handed over together."""

    prompts: Sequence[Sequence[int]]
    new_tokens: int
    alphas: Sequence[float] = field(default=())
    """Of each prompt; an engine that is no dial looks only at how many there are."""
    has_logprobs: bool = False
    """Whether the tokens' logarithmic probabilities are wanted."""

    def at(self, alphas: Sequence[float]) -> Batch:
        """All of these requests at each alpha: first all at the first."""
        return Batch(
            [prompt for _ in alphas for prompt in self.prompts],
            self.new_tokens,
            [alpha for alpha in alphas for _ in self.prompts],
            self.has_logprobs,
        )


@dataclass(frozen=True, slots=True)
class Answers:
    """What engines that began together gave."""

    seconds: float
    """Until the last one was done."""
    tokens: list[list[int]]
    """Of each request: engine by engine."""
    logprobs: list[float]
    """Of all these tokens; empty where the batch did not want them."""


class Engine:
    """A child that is up, and waits."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child
        facts = self.receive()
        self.load_seconds: float = facts["load_seconds"]
        """What `vllm.LLM` took, imports left out."""
        self.private_bytes: int = facts["private_bytes"]
        """What the process holds after its first request."""

    def send(self, batch: Batch) -> None:
        """Let it begin."""
        assert self._child.stdin is not None
        print(json.dumps(asdict(batch)), file=self._child.stdin, flush=True)

    def receive(self) -> dict[str, Any]:
        """Wait until it is done.

        Raises:
            RuntimeError: It has ended.
        """
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith("{"):
                facts: dict[str, Any] = json.loads(line)
                return facts
        raise RuntimeError(f"an engine ended with status {self._child.wait()}; see above")


@contextmanager
def started(
    target: Path, extra: Mapping[str, object], setup: Setup, *, threads: int | None = None
) -> Iterator[Engine]:
    """Start an engine; it has ended when the block has.

    Args:
        target: The checkpoint.
        extra: `model_loader_extra_config`; empty for a plain engine.
        setup: What all engines have.
        threads: Of an engine that shares its cores with others; None for one that has them all.
    """
    # Threads that wait by turning in circles are right for an engine alone. Where several engines
    # share cores they cost the others up to ten times their time.
    shared = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    asked = {"target": str(target), "extra": extra} | asdict(setup)
    command = [sys.executable, "-m", "benchmarks.one_engine", json.dumps(asked)]
    with subprocess.Popen(
        command,
        env=os.environ | ENVIRONMENT | (shared if threads else {}),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        try:
            yield Engine(child)
        finally:
            child.kill()


def answer_at_once(asked: Sequence[tuple[Engine, Batch]]) -> Answers:
    """Have engines answer at the same time, on the same cores."""
    began = time.perf_counter()
    for engine, batch in asked:
        engine.send(batch)
    facts = [engine.receive() for engine, _ in asked]
    seconds = time.perf_counter() - began
    return Answers(
        seconds,
        tokens=[tokens for one in facts for tokens in one["tokens"]],
        logprobs=[number for one in facts for numbers in one["logprobs"] for number in numbers],
    )
