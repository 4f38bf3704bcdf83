"""The router's routes, and what holds for every request: key, errors, marks, records.

No policy, no processes: `create_app` takes what it uses and keeps nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from vllm_rvec.errors import RvecError
from vllm_rvec.router.admin import ADMIN_PATHS, ALIASES_PATH, VARIANTS_PATH, AdminApi
from vllm_rvec.router.cors import CORS_MARKS, allow_origins
from vllm_rvec.router.exchange import EXCHANGE, Exchange
from vllm_rvec.router.feedback import EXPERIMENTS_PATH, FEEDBACK_PATH, FeedbackApi
from vllm_rvec.router.health import HealthWatch
from vllm_rvec.router.models import ModelsApi
from vllm_rvec.router.openai_errors import answer_error, code_of, error_response, kind_of
from vllm_rvec.router.paths import FORWARDED, denial
from vllm_rvec.router.proxy import MAX_BODY_BYTES, Proxy
from vllm_rvec.router.recording import record
from vllm_rvec.router.relay import cut_off
from vllm_rvec.router.telemetry import ErrorKind
from vllm_rvec.vector.dial import ALPHA_HEADER, VARIANT_HEADER

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiohttp.typedefs import Handler, Middleware

    from vllm_rvec.router.admin import Admin
    from vllm_rvec.router.services import Services
    from vllm_rvec.router.upstreams import Upstream

__all__ = ["create_app"]

logger = logging.getLogger("vllm_rvec.router")

METRICS_PATH = "/metrics"
OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", METRICS_PATH})
"""Answered without a key: probes have none, and neither has Prometheus."""


def create_app(
    services: Services, *, admin: Admin | None = None, is_watching: bool = True
) -> web.Application:
    """One OpenAI-compatible address for all variants.

    Args:
        services: What it works with; its variants and configuration may change while it runs.
        admin: Who may change variants and weights, and how; None lets nobody.
        is_watching: Whether upstreams are asked for their health.

    Returns:
        The application, for `start_server`. It starts and ends what `services` keeps on disk.
    """
    app = web.Application(
        middlewares=[
            _recorder(services),
            allow_origins(lambda: services.traffic.routing.cors_origins),
            _answer_errors,
            _require_key(services, admin),
        ],
        client_max_size=MAX_BODY_BYTES,
    )
    app.on_response_prepare.append(_mark_response)
    proxy = Proxy(services)
    _add_routes(app, services, proxy)
    _add_own_routes(app, AdminApi(services, admin), FeedbackApi(services))
    app.cleanup_ctx.append(lambda _: _run(services, proxy, is_watching=is_watching))
    return app


def _add_routes(app: web.Application, services: Services, proxy: Proxy) -> None:
    for path in FORWARDED:
        app.router.add_route(path.method, path.template, partial(proxy.forward, path))
    models = ModelsApi(services)
    app.router.add_get("/v1/models", models.list_models)
    # Names of models may have slashes (`Qwen/Qwen3-0.6B`).
    app.router.add_get("/v1/models/{name:.+}", models.get_model)
    app.router.add_get("/health", models.get_health)
    app.router.add_get("/readyz", models.get_health)
    app.router.add_get("/livez", _live)
    app.router.add_get(METRICS_PATH, partial(_render_metrics, services))


def _add_own_routes(app: web.Application, api: AdminApi, feedback: FeedbackApi) -> None:
    app.router.add_get(VARIANTS_PATH, api.list_variants)
    app.router.add_get(VARIANTS_PATH + "/{name:.+}", api.get_variant)
    app.router.add_put(VARIANTS_PATH + "/{name:.+}", api.put_variant)
    app.router.add_get(ALIASES_PATH, api.list_aliases)
    app.router.add_get(ALIASES_PATH + "/{name:.+}", api.get_alias)
    app.router.add_put(ALIASES_PATH + "/{name:.+}", api.put_alias)
    app.router.add_post(FEEDBACK_PATH, feedback.post_feedback)
    app.router.add_get(EXPERIMENTS_PATH, feedback.get_experiments)


async def _run(services: Services, proxy: Proxy, *, is_watching: bool) -> AsyncIterator[None]:
    """What runs beside the handlers, from the start to the end."""
    if services.results is not None:
        services.results.start()

    def on_state(upstream: Upstream, is_up: bool) -> None:
        for name in services.variants.names():
            if upstream in services.variants.upstreams(name):
                services.metrics.set_upstream(name, upstream.base_url, is_up=is_up)

    watch = HealthWatch(
        services.variants, services.client, lambda: services.traffic.routing.health, on_state
    )
    watching = asyncio.create_task(watch.run()) if is_watching else None
    yield
    if watching is not None:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
    await proxy.shadow.aclose()
    for part in (services.results, services.access_log):
        if part is not None:
            await asyncio.to_thread(part.close)


async def _live(_request: web.Request) -> web.Response:
    """Answer that the process does."""
    return web.json_response({"status": "alive"})


async def _render_metrics(services: Services, request: web.Request) -> web.Response:
    if services.results is not None:
        services.metrics.follow_dropped_results(services.results.dropped)
    body, content_type = services.metrics.render(request.headers.get("Accept", ""))
    return web.Response(body=body, headers={"Content-Type": content_type})


def _recorder(services: Services) -> Middleware:
    """Make an exchange of each request, and see to its end."""

    @web.middleware
    async def begin_and_record(request: web.Request, handler: Handler) -> web.StreamResponse:
        exchange = Exchange(request.headers.get("X-Request-Id") or str(uuid.uuid4()))
        request[EXCHANGE] = exchange
        status = None
        try:
            response = await handler(request)
            status = response.status
        finally:
            record(services, request, exchange, status)
        return response

    return begin_and_record


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn whatever a handler raises into OpenAI's error body."""
    try:
        return await handler(request)
    except web.HTTPException as exc:
        request[EXCHANGE].error = (ErrorKind.REFUSED, "http_error")
        return _answer_http_error(request, exc)
    except RvecError as exc:
        request[EXCHANGE].error = (kind_of(exc), code_of(exc))
        return answer_error(exc)
    except Exception:
        logger.exception("unexpected error for %s %s", request.method, request.rel_url.raw_path)
        request[EXCHANGE].error = (ErrorKind.INTERNAL, "internal_error")
        if request.writer.output_size:
            cut_off(request)  # a second answer behind half of one would be read as its rest
        return error_response(500, "The router failed.", code="internal_error")


def _answer_http_error(request: web.Request, error: web.HTTPException) -> web.Response:
    """Answer what aiohttp itself refuses: unknown paths, wrong methods, large bodies."""
    asked = f"{request.method} {request.rel_url.raw_path}"
    match error:
        case web.HTTPNotFound():
            return _answer_unknown_path(request, asked)
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


def _answer_unknown_path(request: web.Request, asked: str) -> web.Response:
    if (reason := denial(request.path)) is not None:
        message = f"{asked} is kept from clients, because {reason}."
        return error_response(404, message, code="denied_url")
    return error_response(404, f"There is no {asked} here.", code="unknown_url")


def _require_key(services: Services, admin: Admin | None) -> Middleware:
    """Let in who shows a key, or everybody where there is none."""

    def is_let_in(request: web.Request) -> bool:
        keyring = services.traffic.keyring
        request[EXCHANGE].client = client = keyring.identify(request)
        if keyring.is_open or client is not None or request.path in OPEN_PATHS:
            return True
        if not request.path.startswith(ADMIN_PATHS):
            return False
        # A change asks for the admin key itself; and that key may look, too.
        is_change = request.method == "PUT"
        return is_change or (admin is not None and admin.is_shown(request))

    @web.middleware
    async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
        if is_let_in(request):
            return await handler(request)
        request[EXCHANGE].error = (ErrorKind.UNAUTHORIZED, "invalid_api_key")
        return error_response(
            401,
            "The API key is missing or wrong.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    return check_key


async def _mark_response(request: web.Request, response: web.StreamResponse) -> None:
    """Say on every answer, errors included, which request it belongs to and who answered."""
    # Not there when aiohttp refuses a request before any middleware (417).
    if (exchange := request.get(EXCHANGE)) is None:
        return
    for name, value in request.get(CORS_MARKS, {}).items():
        response.headers.add(name, value)  # `Vary` may be there
    response.headers["X-Request-Id"] = exchange.request_id
    if (choice := exchange.choice) is not None:
        response.headers[VARIANT_HEADER] = choice.variant
        response.headers["X-Rvec-Reason"] = choice.reason.value
        if choice.alias is not None:
            response.headers["X-Rvec-Alias"] = choice.alias
    if exchange.alpha is not None:
        # An engine that says them itself knows best: `vllm_xargs` are read only there.
        response.headers.setdefault(ALPHA_HEADER, exchange.alpha)
