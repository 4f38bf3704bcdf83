"""The router's routes, and what holds for every request: key, errors, marks, records.

No policy, no processes: `create_app` takes what it uses and keeps nothing else. It stands on
aiohttp's low-level server: its `Application` costs each request a fifth of a server's time, for
sub-applications, signals and middlewares that nothing here needs.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import hdrs, web
from aiohttp.http import HttpVersion11

from vllm_rvec.errors import ConfigError, RvecError
from vllm_rvec.router.admin import ADMIN_PATHS, ALIASES_PATH, VARIANTS_PATH, AdminApi
from vllm_rvec.router.cors import answer_preflight
from vllm_rvec.router.feedback import EXPERIMENTS_PATH, FEEDBACK_PATH, FeedbackApi
from vllm_rvec.router.health import HealthWatch
from vllm_rvec.router.models import ModelsApi
from vllm_rvec.router.openai_errors import answer_error, code_of, error_response, kind_of
from vllm_rvec.router.paths import FORWARDED, denial
from vllm_rvec.router.proxy import Proxy
from vllm_rvec.router.recording import record
from vllm_rvec.router.relay import cut_off
from vllm_rvec.router.request import MAX_BODY_BYTES, Request
from vllm_rvec.router.telemetry import ErrorKind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from vllm_rvec.router.admin import Admin
    from vllm_rvec.router.exchange import Exchange
    from vllm_rvec.router.keyring import Keyring
    from vllm_rvec.router.services import Services
    from vllm_rvec.router.upstreams import Upstream

    Handler = Callable[[Request], Awaitable[web.StreamResponse]]

__all__ = ["App", "create_app"]

logger = logging.getLogger("vllm_rvec.router")

METRICS_PATH = "/metrics"
OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", METRICS_PATH})
"""Answered without a key: probes have none, and neither has Prometheus."""


def create_app(services: Services, *, admin: Admin | None = None, is_watching: bool = True) -> App:
    """One OpenAI-compatible address for all variants.

    Args:
        services: What it works with; its variants and configuration may change while it runs.
        admin: Who may change variants and weights, and how; None lets nobody.
        is_watching: Whether upstreams are asked for their health.

    Returns:
        The application, for `start_server`.

    Raises:
        ConfigError: The admin key is also a client's.
    """
    if admin is not None:
        check = partial(_check_clients, admin)
        check(services.traffic.keyring)
        services.checks.append(check)
    return App(services, admin, is_watching=is_watching)


def _check_clients(admin: Admin, clients: Keyring) -> None:
    if admin.keyring.shares_key_with(clients):
        raise ConfigError(
            "The admin key is also a client's: that client could change variants.",
            fix="Give each a key of its own (`vllm-rvec new-key`).",
        )


class App:
    """Answers requests; `create_app` makes it.

    Args:
        services: As for `create_app`.
        admin: As for `create_app`.
        is_watching: As for `create_app`.
    """

    def __init__(self, services: Services, admin: Admin | None, *, is_watching: bool) -> None:
        self._services = services
        self._admin = admin
        self._is_watching = is_watching
        self._proxy = Proxy(services)
        self._routes = web.UrlDispatcher()
        self._direct: dict[tuple[str, str], Handler] = {}
        """What has no names in its path, found without looking through the routes."""
        for path in FORWARDED:
            self._add(path.method, path.template, partial(self._proxy.forward, path))
        self._add_own_routes(AdminApi(services, admin), FeedbackApi(services))

    def _add(self, method: str, template: str, handler: Handler) -> None:
        # aiohttp's handlers get an aiohttp.web.Request, which this one isn't and needn't be.
        self._routes.add_route(method, template, handler)  # type: ignore[arg-type]
        if "{" not in template:
            self._direct[method, template] = handler

    def _get(self, template: str, handler: Handler) -> None:
        for method in (hdrs.METH_GET, hdrs.METH_HEAD):
            self._add(method, template, handler)

    def _add_own_routes(self, api: AdminApi, feedback: FeedbackApi) -> None:
        models = ModelsApi(self._services)
        self._get("/v1/models", models.list_models)
        # Names of models may have slashes (`Qwen/Qwen3-0.6B`).
        self._get("/v1/models/{name:.+}", models.get_model)
        self._get("/health", models.get_health)
        self._get("/readyz", models.get_health)
        self._get("/livez", _live)
        self._get(METRICS_PATH, partial(_render_metrics, self._services))
        self._get(VARIANTS_PATH, api.list_variants)
        self._get(VARIANTS_PATH + "/{name:.+}", api.get_variant)
        self._add("PUT", VARIANTS_PATH + "/{name:.+}", api.put_variant)
        self._get(ALIASES_PATH, api.list_aliases)
        self._get(ALIASES_PATH + "/{name:.+}", api.get_alias)
        self._add("PUT", ALIASES_PATH + "/{name:.+}", api.put_alias)
        self._add("POST", FEEDBACK_PATH, feedback.post_feedback)
        self._get(EXPERIMENTS_PATH, feedback.get_experiments)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """What runs beside the requests; what `services` keeps on disk is ended with it."""
        services = self._services
        if services.results is not None:
            services.results.start()
        watching = asyncio.create_task(self._watch().run()) if self._is_watching else None
        try:
            yield
        finally:
            if watching is not None:
                watching.cancel()
                with suppress(asyncio.CancelledError):
                    await watching
            await self._proxy.aclose()
            for part in (services.results, services.access_log):
                if part is not None:
                    await asyncio.to_thread(part.close)

    def _watch(self) -> HealthWatch:
        services = self._services

        def on_state(upstream: Upstream, is_up: bool) -> None:
            for name in services.variants.names():
                if upstream in services.variants.upstreams(name):
                    services.metrics.set_upstream(name, upstream.base_url, is_up=is_up)

        return HealthWatch(
            services.variants, services.client, lambda: services.traffic.routing.health, on_state
        )

    async def handle(self, request: Request) -> web.StreamResponse:
        """Answer a request: let it in or not, answer errors, and see to its end.

        Args:
            request: Any.

        Returns:
            The answer; one that is passed on from an engine has been sent by then.
        """
        status = None
        response: web.StreamResponse
        try:
            response = await self._answer(request)
            status = response.status
        except Exception as exc:  # noqa: BLE001 - the boundary: logged in there
            response = _answer_error(request, exc)
            status = response.status
        finally:
            record(self._services, request, status)
        if not response.prepared:
            request.mark(response)
        return response

    async def _answer(self, request: Request) -> web.StreamResponse:
        traffic, exchange = self._services.traffic, request.exchange
        preflight = answer_preflight(request, traffic.routing.cors_origins)
        if preflight is not None:
            return preflight
        if not (traffic.keyring.is_open or self._is_let_in(request)):
            return _refuse_key(exchange)
        if hdrs.EXPECT in request.headers:
            await _say_continue(request)
        handler = self._direct.get((request.method, request.rel_url.raw_path))
        if handler is None:
            handler = await self._resolve(request)
        config = traffic.keyring.config_of(exchange.client)
        if config is None or request.path in OPEN_PATHS:
            return await handler(request)
        with self._services.limiter.admit(exchange.client, config):
            return await handler(request)

    async def _resolve(self, request: Request) -> Handler:
        match = await self._routes.resolve(request)  # type: ignore[arg-type]
        if match.http_exception is not None:
            raise match.http_exception
        request.match_info = match
        return match.handler  # type: ignore[return-value]

    def _is_let_in(self, request: Request) -> bool:
        """Whether who asks has shown a key that opens this path."""
        client = request.exchange.client = self._services.traffic.keyring.identify(request)
        if client is not None or request.path in OPEN_PATHS:
            return True
        if not request.path.startswith(ADMIN_PATHS):
            return False
        # A change asks for the admin key itself; and that key may look, too.
        is_change = request.method == "PUT"
        return is_change or (self._admin is not None and self._admin.is_shown(request))


async def _say_continue(request: Request) -> None:
    """Answer `Expect: 100-continue` (RFC 9110, 10.1.1), so that the body comes."""
    if request.version != HttpVersion11:
        return
    if request.headers[hdrs.EXPECT].lower() != "100-continue":
        raise web.HTTPExpectationFailed
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # nothing of the answer itself has gone out


async def _live(_request: Request) -> web.Response:
    """Answer that the process does."""
    return web.json_response({"status": "alive"})


async def _render_metrics(services: Services, request: Request) -> web.Response:
    if services.results is not None:
        services.metrics.follow_dropped_results(services.results.dropped)
    body, content_type = services.metrics.render(request.headers.get("Accept", ""))
    return web.Response(body=body, headers={"Content-Type": content_type})


def _answer_error(request: Request, error: Exception) -> web.Response:
    """Turn whatever a handler raises into OpenAI's error body."""
    exchange = request.exchange
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


def _answer_http_error(request: Request, error: web.HTTPException) -> web.Response:
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


def _answer_unknown_path(request: Request, asked: str) -> web.Response:
    if (reason := denial(request.path)) is not None:
        message = f"{asked} is kept from clients, because {reason}."
        return error_response(404, message, code="denied_url")
    return error_response(404, f"There is no {asked} here.", code="unknown_url")


def _refuse_key(exchange: Exchange) -> web.Response:
    exchange.error = (ErrorKind.UNAUTHORIZED, "invalid_api_key")
    return error_response(
        401,
        "The API key is missing or wrong.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
