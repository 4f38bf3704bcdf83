"""The router's routes, and what holds for every request: log line, errors, key.

No policy, no processes: `create_app` takes what it uses and keeps nothing else.
"""

from __future__ import annotations

import logging
import time
import uuid
from typing import TYPE_CHECKING

from aiohttp import web

from vllm_rvec.errors import ConfigError, RvecError
from vllm_rvec.router.admin import ADMIN_PATH, AdminApi
from vllm_rvec.router.keys import shows_key
from vllm_rvec.router.models import ModelsApi
from vllm_rvec.router.openai_errors import answer_error, error_response
from vllm_rvec.router.proxy import ALPHA, MAX_BODY_BYTES, REQUEST_ID, VARIANT, Proxy
from vllm_rvec.router.relay import cut_off
from vllm_rvec.vector.dial import ALPHA_HEADER

if TYPE_CHECKING:
    import aiohttp
    from aiohttp.typedefs import Handler, Middleware

    from vllm_rvec.router.admin import Admin
    from vllm_rvec.router.variants import VariantTable

__all__ = ["FORWARDED_PATHS", "create_app"]

logger = logging.getLogger("vllm_rvec.router")

FORWARDED_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
)
"""All that reaches an engine. A list of what is allowed: engines also have paths that put them to
sleep, load adapters or change weights (`/sleep`, `/update_weights`, `/collective_rpc`, ...)."""

OPEN_PATH = "/health"
"""Answered without a key: probes have none."""

CLIENT_GONE = 499
"""nginx's status for the log when the client left before the answer; no client ever sees it."""


def create_app(
    variants: VariantTable,
    client: aiohttp.ClientSession,
    *,
    api_key: str | None,
    admin: Admin | None = None,
) -> web.Application:
    """One OpenAI-compatible address for all variants.

    Args:
        variants: Who answers for which `model`. May change while the application runs.
        client: What requests go to upstreams with (`create_client`). The caller closes it.
        api_key: What clients must show; None lets everybody in.
        admin: Who may change variants, and how; None lets nobody.

    Returns:
        The application, for `start_server`.

    Raises:
        ConfigError: If a key is empty: that would look like protection and be none.
    """
    if api_key == "":
        raise ConfigError(
            "The router's API key is empty.", fix="Set a key, or none at all to let everybody in."
        )
    app = web.Application(
        middlewares=[_log_requests, _answer_errors, _require_key(api_key, admin)],
        client_max_size=MAX_BODY_BYTES,
    )
    app.on_response_prepare.append(_mark_response)
    _add_routes(app, Proxy(variants, client), ModelsApi(variants, client))
    _add_admin_routes(app, AdminApi(variants, admin))
    return app


def _add_admin_routes(app: web.Application, api: AdminApi) -> None:
    app.router.add_get(ADMIN_PATH, api.list_variants)
    app.router.add_get(ADMIN_PATH + "/{name:.+}", api.get_variant)
    app.router.add_put(ADMIN_PATH + "/{name:.+}", api.put_variant)


def _add_routes(app: web.Application, proxy: Proxy, models: ModelsApi) -> None:
    for path in FORWARDED_PATHS:
        app.router.add_post(path, proxy.forward)
    app.router.add_get("/v1/models", models.list_models)
    # Names of models may have slashes (`Qwen/Qwen3-0.6B`).
    app.router.add_get("/v1/models/{name:.+}", models.get_model)
    app.router.add_get(OPEN_PATH, models.get_health)


@web.middleware
async def _log_requests(request: web.Request, handler: Handler) -> web.StreamResponse:
    """One line per request: method, path, variant, status, milliseconds."""
    request[REQUEST_ID] = request.headers.get("X-Request-Id") or str(uuid.uuid4())
    started = time.perf_counter()
    status = CLIENT_GONE
    try:
        response = await handler(request)
        status = response.status
    finally:
        logger.info(
            "%s %s %s %d %.1f ms",
            request.method,
            # The raw path: a decoded line break would forge a log line. No query: it may hold
            # secrets.
            request.rel_url.raw_path,
            request.get(VARIANT, "-"),
            status,
            (time.perf_counter() - started) * 1000,
        )
    return response


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn whatever a handler raises into OpenAI's error body."""
    try:
        return await handler(request)
    except web.HTTPException as exc:
        return _answer_http_error(request, exc)
    except RvecError as exc:
        return answer_error(exc)
    except Exception:
        logger.exception("unexpected error for %s %s", request.method, request.rel_url.raw_path)
        if request.writer.output_size:
            cut_off(request)  # a second answer behind half of one would be read as its rest
        return error_response(500, "The router failed.", code="internal_error")


def _answer_http_error(request: web.Request, error: web.HTTPException) -> web.Response:
    """Answer what aiohttp itself refuses: unknown paths, wrong methods, large bodies."""
    asked = f"{request.method} {request.rel_url.raw_path}"
    match error:
        case web.HTTPNotFound():
            return error_response(404, f"There is no {asked} here.", code="unknown_url")
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            message = f"There is no {asked} here, only {allowed}."
            headers = {"Allow": allowed}
            return error_response(405, message, code="method_not_allowed", headers=headers)
        case web.HTTPRequestEntityTooLarge():
            message = f"The body is larger than {MAX_BODY_BYTES // 2**20} MiB."
            return error_response(413, message, code="request_too_large")
        case _:
            return error_response(error.status, error.reason, code="http_error")


def _require_key(api_key: str | None, admin: Admin | None) -> Middleware:
    """Let in who shows the key, or everybody where there is none."""

    def is_let_in(request: web.Request) -> bool:
        if api_key is None or request.path == OPEN_PATH or shows_key(request, api_key):
            return True
        if not request.path.startswith(ADMIN_PATH):
            return False
        # A change asks for the admin key itself; and that key may look, too.
        is_change = request.method == "PUT"
        return is_change or (admin is not None and shows_key(request, admin.key))

    @web.middleware
    async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
        if is_let_in(request):
            return await handler(request)
        return error_response(
            401,
            "The API key is missing or wrong.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    return check_key


async def _mark_response(request: web.Request, response: web.StreamResponse) -> None:
    """Say on every answer, errors included, which request and which variant it belongs to."""
    # Not there when aiohttp refuses a request before any middleware (417).
    if REQUEST_ID in request:
        response.headers["X-Request-Id"] = request[REQUEST_ID]
    if VARIANT in request:
        response.headers["X-Rvec-Variant"] = request[VARIANT]
    if ALPHA in request:
        # An engine that says them itself knows best: `vllm_xargs` are read only there.
        response.headers.setdefault(ALPHA_HEADER, request[ALPHA])
