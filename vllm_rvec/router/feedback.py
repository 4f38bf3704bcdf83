"""`/v1/rvec/feedback`, `/v1/rvec/experiments`: what answers were worth, and who is better."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Literal

from aiohttp import web
from pydantic import Field, model_validator

from vllm_rvec.router.bodies import read_model
from vllm_rvec.router.openai_errors import RequestRefusedError
from vllm_rvec.router.results import Outcome
from vllm_rvec.router.settings import Settings

if TYPE_CHECKING:
    from vllm_rvec.router.request import Request
    from vllm_rvec.router.results import ResultsStore
    from vllm_rvec.router.services import Services

__all__ = ["EXPERIMENTS_PATH", "FEEDBACK_PATH", "FeedbackApi"]

FEEDBACK_PATH = "/v1/rvec/feedback"
EXPERIMENTS_PATH = "/v1/rvec/experiments"

EXAMPLE = 'Send {"request_id": "...", "vote": "up"} with the X-Request-Id of the answer.'


class _Feedback(Settings):
    """The body of a POST."""

    request_id: Annotated[str, Field(min_length=1, max_length=200)]
    score: Annotated[float, Field(allow_inf_nan=False, strict=False)] | None = None
    vote: Literal["up", "down"] | None = None
    comment: Annotated[str, Field(max_length=4000)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> _Feedback:
        if self.score is None and self.vote is None and self.comment is None:
            msg = "`score`, `vote` or `comment` is needed"
            raise ValueError(msg)
        return self


class FeedbackApi:
    """The handlers.

    Args:
        services: What they work with.
    """

    def __init__(self, services: Services) -> None:
        self._services = services

    async def post_feedback(self, request: Request) -> web.Response:
        """Keep what an answer was worth; a later word replaces an earlier one.

        Raises:
            RequestRefusedError: The body is wrong, or nobody knows the request.
            ResultsUnavailableError: It can't be kept now.
        """
        results = self._results()
        said = await read_model(request, _Feedback, fix=EXAMPLE)
        outcome = Outcome(said.request_id, time.time(), said.score, said.vote, said.comment)
        if not await results.add(outcome):
            raise RequestRefusedError(
                404,
                "No request of this id was answered here, or it is no longer known.",
                code="unknown_request_id",
                param="request_id",
                fix=EXAMPLE,
            )
        return web.json_response({"object": "rvec.feedback", "request_id": said.request_id})

    async def get_experiments(self, _request: Request) -> web.Response:
        """Which variant of each split is better, as far as can be told.

        Raises:
            RequestRefusedError: Nothing is kept here.
            ResultsUnavailableError: It can't be read now.
        """
        traffic = self._services.traffic
        weights = {name: traffic.weights(name) for name in traffic.routing.aliases}
        aliases = traffic.routing.aliases
        splits = {n: w for n, w in weights.items() if aliases[n].is_split or len(w) > 1}
        found = await self._results().experiments(splits)
        return web.json_response(
            {"object": "list", "data": [summary.as_json() for summary in found]}
        )

    def _results(self) -> ResultsStore:
        if self._services.results is None:
            raise RequestRefusedError(
                404,
                "Results are not kept here.",
                code="results_disabled",
                fix="Set `results: {path: results.sqlite}` in the configuration.",
            )
        return self._services.results
