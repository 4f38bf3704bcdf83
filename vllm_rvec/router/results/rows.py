"""What the results are made of: one row for a request that was served, one for what it was worth.

Says nothing of how rows are stored; that is for `store`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Exposure", "Outcome"]


@dataclass(frozen=True, slots=True)
class Exposure:
    """One request that a variant answered.

    Args:
        request_id: Its X-Request-Id.
        at: Unix seconds. Clocks jump: it is shown and kept, never reckoned with.
        experiment: The alias's name; "" for a request by a variant's own name.
        variant: Who answered.
        reason: Why that variant.
        unit: A hash of the sticky key; "" when the assignment was random for each request, which
            then is the unit.
        status: The HTTP status.
        is_error: Also an error inside a 200 stream.
        ttft_seconds: To the first token, where the answer streamed.
        duration_seconds: To the last byte.
        prompt_tokens: As the engine counted.
        completion_tokens: As the engine counted.
        prompt: The request's body; stored only with `keep_prompts`.
    """

    request_id: str
    at: float
    experiment: str
    variant: str
    reason: str
    unit: str
    status: int
    is_error: bool
    ttft_seconds: float | None
    duration_seconds: float
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a request was worth to who asked.

    Args:
        request_id: The X-Request-Id of the answer.
        at: Unix seconds.
        score: Any finite number; more is better.
        vote: Better or worse than hoped.
        comment: In words. A long one is cut.
    """

    request_id: str
    at: float
    score: float | None = None
    vote: Literal["up", "down"] | None = None
    comment: str | None = None
