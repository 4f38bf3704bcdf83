"""From the answers of a sweep to what they show."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic import JsonValue

    from vllm_rvec.evaluation.records import Answer, Arm, Task
    from vllm_rvec.evaluation.results import SweepResults

__all__ = ["analyse"]


def analyse(
    tasks: Sequence[Task],
    arms: Sequence[Arm],
    answers: Sequence[Answer],
    facts: Mapping[str, JsonValue],
) -> SweepResults:
    """Find out what a sweep shows.

    Args:
        tasks: What was asked.
        arms: In which ways; one of them of the kind `base`.
        answers: In any order; some may be missing, as in a sweep that was interrupted.
        facts: What it takes to repeat the sweep (seeds, configuration, versions, digests, the
            command), to be printed as it is.
    """
    raise NotImplementedError
