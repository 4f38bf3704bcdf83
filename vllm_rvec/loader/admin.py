"""The path by which alpha is changed on a live engine, in vLLM's own API server.

An endpoint plugin of vLLM's (entry point group `vllm.endpoint_plugins`), under a name of its own:
vLLM loads it only where `VLLM_PLUGINS` names `rvec_admin`, so nobody gets it by allowing the load
format. `vllm-rvec serve` does that where it has an admin key.

    GET /v1/rvec/alpha                                      -> {"alpha": 1.0}
    PUT /v1/rvec/alpha  {"alpha": 0.7, "drain_seconds": 30}

It needs our workers too: `--worker-extension-cls vllm_rvec.loader.worker.RvecWorker`. Both
methods lie under `/v1`, which vLLM guards by its API key; without a key PUT is refused, as whoever
reaches the port could use it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import JSONResponse

from vllm_rvec.errors import AlphaChangeFailedError, ConfigError, RvecError
from vllm_rvec.loader import LOAD_FORMAT
from vllm_rvec.loader.live import LiveAlpha, has_our_workers
from vllm_rvec.vector.alpha import AlphaNumber

if TYPE_CHECKING:
    from argparse import Namespace

    from fastapi import FastAPI
    from starlette.datastructures import State
    from starlette.requests import Request
    from starlette.responses import Response

    from vllm_rvec.loader.vllm_api import EngineClient

__all__ = ["ALPHA_PATH", "AdminPlugin"]

logger = logging.getLogger("vllm.rvec")

ALPHA_PATH = "/v1/rvec/alpha"
WORKER = "vllm_rvec.loader.worker.RvecWorker"
SHOWN_PROBLEMS = 8
ANSWER_SECONDS = 1.0
"""What the answer to a failed change gets to leave, before the server ends."""


class _Wish(BaseModel):
    """The body of a PUT."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    alpha: AlphaNumber
    """The scaling coefficient to serve."""
    drain_seconds: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    """How long requests under way may take to end."""


class AdminPlugin:
    """What vLLM asks of an endpoint plugin."""

    name = "rvec_admin"
    required_tasks = None

    def __init__(self) -> None:
        self._live: LiveAlpha | None = None
        self._why_not = "this server has no engine"

    def attach_router(self, app: FastAPI) -> None:
        """Add the path to vLLM's server."""
        app.router.add_route(ALPHA_PATH, self._get, methods=["GET"])
        app.router.add_route(ALPHA_PATH, self._put, methods=["PUT"])

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Note, at the end of the server's start, what it was loaded from."""
        del state
        if engine_client is None:
            return
        load_format = engine_client.vllm_config.load_config.load_format
        if load_format != LOAD_FORMAT:
            self._why_not = f"its load format is {load_format}: there is no vector in it"
        elif (getattr(args, "api_server_count", None) or 1) > 1:
            self._why_not = "several API servers share the engine; start it with one"
        elif not (args.api_key or os.environ.get("VLLM_API_KEY")):
            self._why_not = "the server has no API key, so anybody could; start it with one"
        elif not has_our_workers(engine_client):
            self._why_not = f"start the server with --worker-extension-cls {WORKER}"
        else:
            self._live = LiveAlpha(engine_client)
            await self._live.note_files()

    async def _get(self, _request: Request) -> Response:
        """Say what is served now."""
        if self._live is None:
            return self._refuse()
        return JSONResponse({"alpha": self._live.alpha})

    async def _put(self, request: Request) -> Response:
        """Change alpha."""
        if self._live is None:
            return self._refuse()
        try:
            wish = _Wish.model_validate_json(await request.body())
            done = await self._live.change(wish.alpha, drain_seconds=wish.drain_seconds)
        except ValidationError as exc:
            return _error(400, _plain(exc), "invalid_body")
        except RvecError as exc:
            return _answer(exc)
        return JSONResponse(dataclasses.asdict(done))

    def _refuse(self) -> Response:
        message = f"alpha can't be changed here: {self._why_not}"
        return _error(403, message, "alpha_change_disabled")


def _plain(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, p['loc'])) or 'body'}: {p['msg']}" for p in problems)


def _answer(error: RvecError) -> Response:
    if isinstance(error, AlphaChangeFailedError):
        _end_soon()
        return _error(500, _one_line(error), "alpha_change_failed")
    if isinstance(error, ConfigError):
        return _error(400, _one_line(error), "invalid_alpha")
    return _error(409, _one_line(error), "alpha_change_refused")


def _one_line(error: RvecError) -> str:
    parts = [error.what, *error.problems[:SHOWN_PROBLEMS], error.why]
    return " ".join("; ".join(filter(None, parts)).split())


def _end_soon() -> None:
    """End the server, as a crash would: whoever runs it starts it again, with sound weights."""
    logger.error("The server ends, since its engine's weights may be a mixture")
    asyncio.get_running_loop().call_later(ANSWER_SECONDS, os.kill, os.getpid(), signal.SIGTERM)


def _error(status: int, message: str, code: str) -> Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status_code=status)
