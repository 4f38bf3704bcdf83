"""Ask an engine for another alpha, over its own HTTP (`loader/admin`).

Two kinds of failure come of it, and they must not be mixed up: what the engine refuses leaves it as
it was; after anything else nobody knows what its weights are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import aiohttp
from pydantic import BaseModel, TypeAdapter, ValidationError

from vllm_rvec.errors import AlphaChangeFailedError, AlphaChangeRefusedError
from vllm_rvec.vector.alpha import AlphaChange

if TYPE_CHECKING:
    from vllm_rvec.serve.engine import EngineProcess

__all__ = ["ask_for_alpha"]

ALPHA_PATH = "/v1/rvec/alpha"

DRAIN_SECONDS = 10.0
"""What the engine may take over requests whose clients have just gone; all others have ended."""

SHOWN_CHARACTERS = 1000
"""How much of what an engine says goes into a message."""


_CHANGE = TypeAdapter(AlphaChange)


class _ErrorText(BaseModel):
    message: str


class _ErrorBody(BaseModel):
    error: _ErrorText


async def ask_for_alpha(
    engine: EngineProcess, alpha: float, *, timeout_seconds: float
) -> AlphaChange:
    """Have an engine reload its weights at another alpha.

    Args:
        engine: Ready, and with nothing under way that anybody waits for.
        alpha: The new one.
        timeout_seconds: When to give up. The engine is to be killed then.

    Raises:
        AlphaChangeRefusedError: The engine goes on as it was.
        AlphaChangeFailedError: Nobody knows what its weights are: kill it.
    """
    timeout = aiohttp.ClientTimeout(total=timeout_seconds)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.put(
                engine.base_url + ALPHA_PATH,
                headers={"Authorization": f"Bearer {engine.api_key}"},
                json={"alpha": alpha, "drain_seconds": DRAIN_SECONDS},
            ) as response,
        ):
            status, body = response.status, await response.read()
    except TimeoutError as exc:
        raise _failed(f"the engine did not answer within {timeout_seconds:g} s") from exc
    except (aiohttp.ClientError, OSError) as exc:
        raise _failed(f"the engine broke off ({type(exc).__name__})") from exc
    return _read(status, body)


def _read(status: int, body: bytes) -> AlphaChange:
    if status == 200:
        try:
            return _CHANGE.validate_json(body)
        except ValidationError as exc:
            raise _failed("the engine's answer is not understood") from exc
    try:
        said = _ErrorBody.model_validate_json(body).error.message[:SHOWN_CHARACTERS]
    except ValidationError:
        said = f"it answered with HTTP status {status}"
    if 400 <= status < 500:
        raise AlphaChangeRefusedError("the engine refuses to change alpha", why=said)
    raise _failed(said)


def _failed(why: str) -> AlphaChangeFailedError:
    return AlphaChangeFailedError(
        "the change of alpha failed part-way",
        why=why,
        fix="the engine starts again at its old alpha; ask again when it is ready",
    )
