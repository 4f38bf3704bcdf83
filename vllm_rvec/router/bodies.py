"""Reading the small JSON bodies that are for the router itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from aiohttp import web
from pydantic import BaseModel, ValidationError

from vllm_rvec.router.openai_errors import RequestRefusedError

if TYPE_CHECKING:
    from typing import Any

    from vllm_rvec.router.request import Request

__all__ = ["read_model"]

MAX_BYTES = 20_000

ModelT = TypeVar("ModelT", bound=BaseModel)


async def read_model(request: Request, kind: type[ModelT], *, fix: str) -> ModelT:
    """Read a body.

    Args:
        request: Whose.
        kind: What it must be.
        fix: What to tell who sends something else.

    Raises:
        RequestRefusedError: It is large, or something else; all problems at once, no value quoted.
    """
    try:
        body = b""
        while len(body) <= MAX_BYTES and (more := await request.content.readany()):
            body += more
        if len(body) > MAX_BYTES:
            what = f"The body is larger than {MAX_BYTES // 1000} kB."
            raise RequestRefusedError(413, what, code="request_too_large", fix=fix)
        return kind.model_validate_json(body)
    except web.RequestPayloadError as exc:
        raise RequestRefusedError(400, "The body was cut off.", code="invalid_body") from exc
    except ValidationError as exc:
        problems = exc.errors(include_url=False, include_input=False)
    named = [f"{'.'.join(map(str, p['loc'])) or 'body'}: {p['msg']}" for p in problems]
    raise RequestRefusedError(
        400,
        f"The body can't be used: {'; '.join(named)}.",
        code="invalid_body",
        param=_param(problems[0]["loc"]),
        fix=fix,
    )


def _param(place: tuple[Any, ...]) -> str | None:
    return str(place[0]) if place else None
