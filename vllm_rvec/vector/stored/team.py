"""Threads that share the work on one tensor.

The compiled loops and PyTorch's kernels release Python's lock. As many threads as PyTorch itself
would use: vLLM sets that number to the cores that are a rank's own.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cached_property
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Team"]

TASKS = Path("/proc/self/task")

SHARED_ELEMENTS = 1 << 17
"""With fewer, waking a thread takes longer than doing its share."""


class Team:
    """Threads, started when there is first something to share; they end with this object.

    Args:
        size: How many; as many as PyTorch uses where None. With one, the caller does all.
    """

    def __init__(self, size: int | None = None) -> None:
        self.size = size or torch.get_num_threads()

    def run(self, jobs: Iterable[Callable[[], object]]) -> None:
        """Do all jobs, in any order, and wait for them; the caller does its share.

        Raises:
            Exception: What a job has raised; all others have ended by then.
        """
        first, *others = jobs
        if self.size == 1:
            for job in (first, *others):
                job()
            return
        waiting = [self._pool.submit(job) for job in others]
        try:
            first()
        finally:
            wait(waiting)
        for done in waiting:
            done.result()

    def shares(self, elements: int) -> Iterator[tuple[int, int]]:
        """Cut so many elements into equal stretches, one for each thread, if they are worth it."""
        count = self.size if elements >= SHARED_ELEMENTS else 1
        size = -(-elements // count)
        return ((first, min(first + size, elements)) for first in range(0, elements, size))

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        others = self.size - 1
        pool = ThreadPoolExecutor(others, "rvec-add", _settle, (_cores(),))
        # All threads start now: each sets PyTorch's number for itself, and with it the number that
        # others get which ask later; that one is set right again.
        meet = Barrier(others)
        for started in [pool.submit(meet.wait) for _ in range(others)]:
            started.result()
        torch.set_num_threads(self.size)
        return pool


def _settle(cores: set[int]) -> None:
    """Prepare one thread: not bound to its parent's core, and alone in PyTorch's kernels."""
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(1)


def _cores() -> set[int]:
    """Return the cores that this process's threads may run on.

    vLLM's CPU worker binds each thread of PyTorch to a core of its own, the main one too; a thread
    that the main one starts would share that core with it.
    """
    cores: set[int] = set()
    for task in TASKS.iterdir():
        try:
            cores |= os.sched_getaffinity(int(task.name))
        except ProcessLookupError:  # it has just ended
            continue
    return cores or os.sched_getaffinity(0)
