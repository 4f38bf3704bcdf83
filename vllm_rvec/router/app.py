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

from vllm_rvec.errors import ConfigError, RvecError
from vllm_rvec.router.admin import ADMIN_PATHS, ALIASES_PATH, VARIANTS_PATH, AdminApi
from vllm_rvec.router.cors import CORS_MARKS, answer_preflight
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
    from collections.abc import AsyncIterator, Callable

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

    Raises:
        ConfigError: The admin key is also a client's.
    """
    if admin is not None and admin.keyring.shares_key_with(services.traffic.keyring):
        raise ConfigError(
            "The admin key is also a client's: that client could change variants.",
            fix="Give each a key of its own (`vllm-rvec new-key`).",
        )
    app = web.Application(
        # One, not four: each is a coroutine more for every request.
        middlewares=[_middleware(services, admin)],
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
    await proxy.aclose()
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


def _middleware(services: Services, admin: Admin | None) -> Middleware:
    """Make an exchange of each request, let it in or not, answer errors, and see to its end."""
    is_let_in = _door(services, admin)

    @web.middleware
    async def see_through(request: web.Request, handler: Handler) -> web.StreamResponse:
        exchange = Exchange(request.headers.get("X-Request-Id") or str(uuid.uuid4()))
        request[EXCHANGE] = exchange
        status = None
        response: web.StreamResponse | None
        try:
            response = answer_preflight(request, services.traffic.routing.cors_origins)
            if response is None and not is_let_in(request, exchange):
                response = _refuse_key(exchange)
            response = response or await handler(request)
            status = response.status
        except Exception as exc:  # noqa: BLE001 - the boundary: logged in there
            response = _answer_error(request, exc)
            status = response.status
        finally:
            record(services, request, exchange, status)
        return response

    return see_through


def _answer_error(request: web.Request, error: Exception) -> web.Response:
    """Turn whatever a handler raises into OpenAI's error body."""
    exchange = request[EXCHANGE]
    if isinstance(error, web.HTTPException):
        exchange.error = (ErrorKind.REFUSED, "http_error")
        return _answer_http_error(request, error)
    if isinstance(error, RvecError):
        exchange.error = (kind_of(error), code_of(error))
        return answer_error(error)
    asked = f"{request.method} {request.rel_url.raw_path}"
    logger.error("unexpected error for %s", asked, exc_info=error)
    exchange.error = (ErrorKind.INTERNAL, "internal_error")
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


def _door(services: Services, admin: Admin | None) -> Callable[[web.Request, Exchange], bool]:
    """Let in who shows a key, or everybody where there is none."""

    def is_let_in(request: web.Request, exchange: Exchange) -> bool:
        keyring = services.traffic.keyring
        if keyring.is_open:
            return True
        exchange.client = client = keyring.identify(request)
        if client is not None or request.path in OPEN_PATHS:
            return True
        if not request.path.startswith(ADMIN_PATHS):
            return False
        # A change asks for the admin key itself; and that key may look, too.
        is_change = request.method == "PUT"
        return is_change or (admin is not None and admin.is_shown(request))

    return is_let_in


def _refuse_key(exchange: Exchange) -> web.Response:
    exchange.error = (ErrorKind.UNAUTHORIZED, "invalid_api_key")
    return error_response(
        401,
        "The API key is missing or wrong.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


async def _mark_response(request: web.Request, response: web.StreamResponse) -> None:
    """Say on every answer, errors included, which request it belongs to and who answered."""
    # Not there when aiohttp refuses a request before any middleware (417).
    if (exchange := request.get(EXCHANGE)) is None:
        return
    if (marks := request.get(CORS_MARKS)) is not None:
        response.headers.extend(marks)  # `Vary` may be there
    response.headers["X-Request-Id"] = exchange.request_id
    if (choice := exchange.choice) is not None:
        response.headers[VARIANT_HEADER] = choice.variant
        response.headers["X-Rvec-Reason"] = choice.reason.value
        if choice.alias is not None:
            response.headers["X-Rvec-Alias"] = choice.alias
    if exchange.alpha is not None:
        # An engine that says them itself knows best: `vllm_xargs` are read only there.
        response.headers.setdefault(ALPHA_HEADER, exchange.alpha)
