"""Passing one request on to an upstream of its variant; `relay.py` brings the answer back.

Bodies, paths and queries go through as they came; of the headers, only those of the connection
itself are dropped (`headers.py`). Which variant that is, `policy` says; here is what happens when
an upstream fails before its answer begins: another one of the variant's, then the variant that is
configured to stand in.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from aiohttp import web
from multidict import CIMultiDict
from pydantic import BaseModel, JsonValue, ValidationError

from vllm_rvec.errors import UpstreamError
from vllm_rvec.router.alphas import AlphaWish, settle
from vllm_rvec.router.assignment import Reason, sticky_key, user_in
from vllm_rvec.router.gate import HeldTooLongError
from vllm_rvec.router.headers import bearer, request_headers
from vllm_rvec.router.held import Held
from vllm_rvec.router.limits import VariantBusyError
from vllm_rvec.router.openai_errors import RequestRefusedError
from vllm_rvec.router.owners import FIRST_BYTES, SAFE_ID, response_id_of
from vllm_rvec.router.paths import Kind, read_form_model
from vllm_rvec.router.policy import Choice
from vllm_rvec.router.relay import brief, relay
from vllm_rvec.router.request import MAX_BODY_BYTES
from vllm_rvec.router.sending import CONNECTION_ERRORS, Message, Sender
from vllm_rvec.router.shadow import ShadowRequest, ShadowTraffic
from vllm_rvec.router.telemetry import Outcome
from vllm_rvec.router.variants import VariantDownError, names_there_are

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vllm_rvec.router.alphas import Settled
    from vllm_rvec.router.answers import Answer
    from vllm_rvec.router.exchange import Exchange
    from vllm_rvec.router.owners import ResponseOwners
    from vllm_rvec.router.paths import ForwardedPath
    from vllm_rvec.router.request import Request
    from vllm_rvec.router.services import Services
    from vllm_rvec.router.shadow import Ticket
    from vllm_rvec.router.upstreams import Upstream
    from vllm_rvec.router.variants import VariantTable

__all__ = ["Proxy"]

logger = logging.getLogger("vllm_rvec.router")

BODY_SECONDS = 300.0
"""How long a body may take to arrive: 64 MiB at 2 Mbit/s."""

STANDS_IN_FOR = (VariantDownError, VariantBusyError, HeldTooLongError)
"""What a variant's fallback is for: it can't answer, and nothing of an answer has come."""


class Proxy:
    """Forwards requests to upstreams.

    Args:
        services: What it works with.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._variants = services.variants
        self._sender = Sender(services.variants, services.client, services.metrics)
        self.shadow = ShadowTraffic(self._send_copy, services.metrics.record_shadow)
        """The copies for shadow variants."""
        services.followers.append(self._follow_shadows)

    async def forward(self, path: ForwardedPath, request: Request) -> web.StreamResponse:
        """Pass a request on and its answer back, as it comes.

        Args:
            path: What is known of its path.
            request: The client's.

        Returns:
            The upstream's answer, already sent.

        Raises:
            RequestRefusedError: If the body is too large, doesn't say which model, or asks for
                alphas that nobody has.
            UnknownVariantError: If there is no such variant.
            VariantDownError: If the variant can't answer now.
            VariantBusyError: If it has as many requests as it may.
            HeldTooLongError: If its weights are being changed, and that takes long.
            UpstreamError: If the upstream fails before it answers.
        """
        exchange = request.exchange
        exchange.body = await _read_body(request)
        exchange.is_generating = path.is_generating
        if path.kind is Kind.OWNER:
            return await self._forward_to_owner(request)
        asked = self._read(path, request, exchange.body)
        return await self._forward_to_variant(path, request, asked)

    async def aclose(self) -> None:
        """End what runs beside requests."""
        await self.shadow.aclose()
        await self._sender.aclose()

    async def _forward_to_variant(
        self, path: ForwardedPath, request: Request, asked: _Asked
    ) -> web.StreamResponse:
        exchange, wish = request.exchange, AlphaWish.of(asked.alpha, request.headers)
        choice, pinned = self._choose(request, asked, wish)
        exchange.choice = choice
        wanted = _Wanted(request, asked.model, wish, pinned)
        held = Held()
        try:
            answer, upstream, choice = await self._reach(held, wanted, choice)
            if path.is_stateful and answer.status == 200:
                owned = _OwnerNote(self._services.owners, choice.variant, upstream)
                exchange.listeners.append(owned.hear)
            ticket = self._offer_copy(path, wanted, choice)
            response = await relay(request, answer)
            _end_ticket(ticket, exchange)
            return response
        finally:
            held.give_back()

    def _read(self, path: ForwardedPath, request: Request, body: bytes) -> _Asked:
        if path.kind is Kind.BODY:
            return _read_asked(body, self._hint)
        model = read_form_model(body, request.headers.get("Content-Type", ""))
        if model is None:
            what = "The form doesn't say which `model` to ask, once and readably."
            raise RequestRefusedError(
                400, what, code="missing_model", param="model", fix=self._hint()
            )
        return _Asked(model=model)

    def _hint(self) -> str:
        names = [*self._variants.names(), *self._services.traffic.routing.aliases]
        return names_there_are(names, self._variants.alpha_range)

    def _choose(
        self, request: Request, asked: _Asked, wish: AlphaWish | None
    ) -> tuple[Choice, Upstream | None]:
        """Choose the variant, and the one upstream that can go on from an earlier response."""
        key = None
        if self._services.traffic.alias(asked.model) is not None:
            client = request.exchange.client
            name = client.name if client else None
            key = sticky_key(request.headers, user_in(vars(asked)), name)
        choice = self._services.traffic.choose(asked.model, wish, key)
        if not isinstance(asked.previous_response_id, str):
            return choice, None
        owner = self._services.owners.find(asked.previous_response_id)
        if owner is None or not self._variants.has(owner.variant):
            return choice, None
        if choice.alias is not None and wish is None:
            # The split has chosen when the conversation began.
            choice = replace(choice, variant=owner.variant, reason=Reason.OWNER)
        there = self._variants.upstreams(choice.variant)
        return choice, next((u for u in there if u.base_url == owner.base_url), None)

    async def _reach(
        self, held: Held, wanted: _Wanted, choice: Choice
    ) -> tuple[Answer, Upstream, Choice]:
        """Get an answer from the chosen variant, or from the one that stands in for it."""
        try:
            return *await self._enter(held, wanted, choice), choice
        except STANDS_IN_FOR:
            other = self._services.traffic.fallback(choice.variant)
            if other is None or wanted.wish is not None or wanted.pinned is not None:
                raise
            self._services.metrics.record_fallback(choice.variant, other)
            exchange = wanted.request.exchange
            alpha = exchange.alpha
            instead = replace(choice, variant=other, reason=Reason.FALLBACK)
            try:
                return *await self._enter(held, wanted, instead), instead
            except STANDS_IN_FOR:
                logger.info("%s can't stand in for %s either", other, choice.variant)
                exchange.choice, exchange.alpha = choice, alpha
            raise  # what the client asked for is what it is told about

    async def _enter(self, held: Held, wanted: _Wanted, choice: Choice) -> tuple[Answer, Upstream]:
        """Get an answer from a variant; what it holds meanwhile stays held."""
        earlier = len(held)
        wanted.request.exchange.choice = choice
        try:
            held.add(self._services.traffic.limit(choice.variant).take())
            held.add(self._services.metrics.under_way(choice.variant))
            held.add(await self._variants.gate(choice.variant).enter())
            message = self._message(wanted, choice.variant)
            return await self._sender.send(held, choice.variant, message, wanted.pinned)
        except BaseException:
            held.give_back(down_to=earlier)
            raise

    def _message(self, wanted: _Wanted, variant: str) -> Message:
        """What a variant is sent: the request, and its alphas."""
        request, exchange = wanted.request, wanted.request.exchange
        # They can't change while this request is under way; while it waited, they could.
        if wanted.wish is not None:
            _check_wish(wanted.wish, self._variants, variant)
        settled = settle(
            self._variants,
            variant,
            wanted.model,
            wanted.wish,
            is_generating=exchange.is_generating,
        )
        exchange.alpha = settled.said
        return Message(
            request.method,
            request.rel_url.raw_path_qs,
            exchange.body,
            lambda upstream: request_headers(
                request.headers, upstream, exchange.request_id, settled.engine_headers
            ),
        )

    async def _forward_to_owner(self, request: Request) -> web.StreamResponse:
        """Ask for a stored response where it is; of one that nobody knows, everywhere."""
        exchange = request.exchange
        response_id = request.match_info["response_id"]
        if not SAFE_ID.fullmatch(response_id):
            raise RequestRefusedError(404, "There is no such response.", code="not_found")
        owner = self._services.owners.find(response_id)
        there = self._variants.upstreams()
        known = [u for u in there if owner is not None and u.base_url == owner.base_url]
        if owner is not None and known:
            exchange.choice = Choice(owner.variant, Reason.OWNER)
        message = Message(
            request.method,
            request.rel_url.raw_path_qs,
            exchange.body,
            lambda upstream: request_headers(request.headers, upstream, exchange.request_id),
        )
        is_sure = True
        for upstream in (candidates := known or list(there)):
            if not known and not self._variants.load.is_well(upstream):
                is_sure = False  # one that hangs would be waited for
                continue
            try:
                answer = await self._sender.send_to(upstream, message)
            except CONNECTION_ERRORS as exc:
                logger.info("can't reach %s: %s", upstream.base_url, brief(exc))
                is_sure = False
                continue
            try:
                is_told = answer.status < 500 and answer.status != 404
                if known or is_told or (is_sure and upstream == candidates[-1]):
                    return await relay(request, answer)
                is_sure = is_sure and answer.status == 404
            finally:
                self._sender.let_go(upstream, answer)
        raise UpstreamError("No engine can be reached that may have this response.")

    def _follow_shadows(self) -> None:
        aliases = self._services.traffic.routing.aliases
        self.shadow.reconfigure({n: a.shadow for n, a in aliases.items() if a.shadow is not None})

    def _offer_copy(self, path: ForwardedPath, wanted: _Wanted, choice: Choice) -> Ticket | None:
        alias = self._services.traffic.alias(choice.alias) if choice.alias else None
        if choice.alias is None or alias is None or alias.shadow is None:
            return None
        if not path.is_generating or choice.variant == alias.shadow.variant:
            return None
        request, exchange = wanted.request, wanted.request.exchange
        copied = ShadowRequest(
            exchange.request_id,
            choice.variant,
            request.rel_url.raw_path,
            exchange.body,
            request.headers,
        )
        ticket = self.shadow.offer(choice.alias, alias.shadow, copied)
        if ticket is not None:
            exchange.listeners.append(ticket.chunk)
        return ticket

    async def _send_copy(
        self, variant: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, bytes]:
        """Send a copy to its shadow variant, as `shadow` asks for it."""
        held = Held()
        try:
            held.add(self._services.traffic.limit(variant).take())
            held.add(await self._variants.gate(variant).enter())
            settled = settle(self._variants, variant, variant, None)
            message = Message("POST", path, body, lambda u: _copy_headers(headers, u, settled))
            answer, _ = await self._sender.send(held, variant, message)
            return answer.status, await answer.read()
        finally:
            held.give_back()


def _check_wish(wish: AlphaWish, variants: VariantTable, chosen: str) -> None:
    """Make sure that the chosen variant still has the alphas that were asked for."""
    if wish.variant(variants, (chosen,)) != chosen:
        raise RequestRefusedError(
            409,
            f"The alpha of `{chosen}` has just been changed.",
            code="alpha_changed",
            param="alpha",
            fix="Ask again.",
        )


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A request for a variant, read."""

    request: Request
    model: str
    """As the body names it."""
    wish: AlphaWish | None
    pinned: Upstream | None
    """The one upstream that can answer, where an earlier response of its is gone on from."""


class _OwnerNote:
    """Finds in the beginning of an answer which response it is, and notes who has it."""

    def __init__(self, owners: ResponseOwners, variant: str, upstream: Upstream) -> None:
        self._owners = owners
        self._variant = variant
        self._upstream = upstream
        self._begun: bytes | None = b""

    def hear(self, data: bytes) -> None:
        """Take the next bytes of the answer."""
        if self._begun is None:
            return
        self._begun += data[:FIRST_BYTES]
        found = response_id_of(self._begun)
        if found is not None:
            self._owners.note(found, self._variant, self._upstream.base_url)
        if found is not None or len(self._begun) >= FIRST_BYTES:
            self._begun = None


def _end_ticket(ticket: Ticket | None, exchange: Exchange) -> None:
    seen = exchange.seen
    if ticket is not None and seen is not None and seen.status is not None:
        ticket.done(seen.status, is_complete=seen.outcome is Outcome.COMPLETE)


def _copy_headers(
    headers: Mapping[str, str], upstream: Upstream, settled: Settled
) -> CIMultiDict[str]:
    own = {name: value for name, value in settled.engine_headers.items() if value is not None}
    return CIMultiDict({**headers, **own, **bearer(upstream)})


class _Asked(BaseModel):
    """What the router reads of a body; the rest is the engine's business."""

    model: str
    alpha: JsonValue = None
    user: JsonValue = None
    safety_identifier: JsonValue = None
    prompt_cache_key: JsonValue = None
    previous_response_id: JsonValue = None


async def _read_body(request: Request) -> bytes:
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise web.HTTPRequestEntityTooLarge(MAX_BODY_BYTES)
    if "Content-Encoding" in request.headers:
        raise RequestRefusedError(
            415,
            "The router reads `model` from the body, which must not be compressed.",
            code="unsupported_content_encoding",
            fix="Send it without Content-Encoding.",
        )
    try:
        if request.content.is_eof():  # as a rule it comes with the head
            return await request.read()
        async with asyncio.timeout(BODY_SECONDS):
            return await request.read()
    except TimeoutError as exc:
        what = f"The body did not arrive within {BODY_SECONDS:g} s."
        raise RequestRefusedError(408, what, code="request_timeout") from exc
    except web.RequestPayloadError as exc:
        raise RequestRefusedError(
            400, "The body did not arrive as its headers say.", code="invalid_body"
        ) from exc


def _read_asked(body: bytes, hint: Callable[[], str]) -> _Asked:
    """Find the name of the variant, and the alphas, if any."""
    try:
        return _Asked.model_validate_json(body)
    except ValidationError as exc:
        # The input stays out of it: it may be 64 MiB, and it is the client's own.
        problem = exc.errors(include_url=False, include_context=False, include_input=False)[0]
    match problem["type"]:
        case "json_invalid":
            raise RequestRefusedError(400, f"{problem['msg']}.", code="invalid_json")
        case "missing":
            what = "The body doesn't say which `model` to ask."
            raise RequestRefusedError(400, what, code="missing_model", param="model", fix=hint())
        case "string_type":
            what = "`model` must be a string."
            raise RequestRefusedError(400, what, code="invalid_model", param="model", fix=hint())
        case _:
            raise RequestRefusedError(
                400, "The body must be a JSON object.", code="invalid_json", fix=hint()
            )
