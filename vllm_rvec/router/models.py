"""What the router answers itself: which models there are, and whether they are well."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_rvec.router.headers import bearer

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from vllm_rvec.router.request import Request
    from vllm_rvec.router.services import Services
    from vllm_rvec.router.upstreams import Upstream
    from vllm_rvec.router.variants import VariantFacts

__all__ = ["ModelsApi"]

logger = logging.getLogger("vllm_rvec.router")

OWNER = "vllm-rvec"

CARD_SECONDS = 5.0
"""How long an engine may take to list its models. A busy one still answers in milliseconds."""


class _Card(BaseModel):
    """One model as an engine describes it (`max_model_len`, `root`, ...), kept as it is."""

    model_config = ConfigDict(extra="allow")

    id: str


class _CardList(BaseModel):
    data: list[_Card]


class ModelsApi:
    """`/v1/models` over all upstreams, and `/health`.

    Args:
        services: What there is.
    """

    def __init__(self, services: Services) -> None:
        self._variants = services.variants
        self._traffic = services.traffic
        self._client = services.client

    async def list_models(self, _request: Request) -> web.Response:
        """All variants that are ready, and the aliases, in OpenAI's list shape.

        Returns:
            A card each: the engine's own where it gives one, else a bare one. One engine that
            does not answer spoils only its own cards.
        """
        ready = self._ready()
        cards = await self._cards(set(ready.values()))
        data = [self._card(name, cards[upstream]) for name, upstream in ready.items()]
        data += [self._alias_card(name, ready, cards) for name in self._traffic.routing.aliases]
        return web.json_response({"object": "list", "data": data})

    async def get_model(self, request: Request) -> web.Response:
        """The card of one variant.

        Raises:
            UnknownVariantError: If there is no such variant.
            VariantDownError: If it is down.
        """
        name = request.match_info["name"]
        if self._traffic.alias(name) is not None:
            ready = self._ready()
            first = self._first_ready(name, ready)
            cards = {} if first is None else await self._cards([ready[first]])
            return web.json_response(self._alias_card(name, ready, cards))
        if not self._variants.has(name):
            raise self._traffic.unknown(name)
        upstream = self._variants.find(name)
        return web.json_response(self._card(name, await self._ask(upstream)))

    async def get_health(self, _request: Request) -> web.Response:
        """Whether requests can be answered.

        Returns:
            200 as long as one variant is ready: a balancer that dropped a degraded router would
            drop the ready ones with it.
        """
        names = self._variants.names()
        reasons = {name: self._variants.down_reason(name) for name in names}
        ready_count = sum(reason is None for reason in reasons.values())
        status = "down" if not ready_count else "ready" if ready_count == len(names) else "degraded"
        states = {name: "ready" if reason is None else reason for name, reason in reasons.items()}
        return web.json_response(
            {"status": status, "variants": states}, status=200 if ready_count else 503
        )

    def _ready(self) -> dict[str, Upstream]:
        """An upstream of each variant that has one."""
        names = self._variants.names()
        ready = [name for name in names if self._variants.down_reason(name) is None]
        return {name: self._variants.find(name) for name in ready}

    def _first_ready(self, alias: str, ready: Container[str]) -> str | None:
        """The first variant of an alias that is ready."""
        return next((name for name in self._traffic.weights(alias) if name in ready), None)

    async def _cards(self, upstreams: Iterable[Upstream]) -> dict[Upstream, dict[str, Any]]:
        """Each upstream's cards by name, asked at once, each upstream once."""
        asked = list(upstreams)
        return dict(zip(asked, await asyncio.gather(*map(self._ask, asked)), strict=True))

    async def _ask(self, upstream: Upstream) -> dict[str, Any]:
        """An upstream's cards by name; empty where it doesn't give them."""
        try:
            async with self._client.get(
                upstream.url("/v1/models"),
                headers=bearer(upstream),
                timeout=aiohttp.ClientTimeout(total=CARD_SECONDS),
            ) as answer:
                cards = _CardList.model_validate_json(await answer.read()).data
        except (aiohttp.ClientError, TimeoutError, ValidationError) as exc:
            logger.warning("no model list from %s: %s", upstream, type(exc).__name__)
            return {}
        return {card.id: card.model_dump() for card in cards}

    def _alias_card(
        self, name: str, ready: dict[str, Upstream], cards: dict[Upstream, dict[str, Any]]
    ) -> dict[str, Any]:
        """An alias's card: what its first variant that is ready can do, and its weights."""
        first = self._first_ready(name, ready)
        card = {} if first is None else self._card(first, cards[ready[first]])
        card = {**_bare_card(name), **card, "id": name}
        return {**card, "rvec": {"split": dict(self._traffic.weights(name))}}

    def _card(self, name: str, cards: dict[str, Any]) -> dict[str, Any]:
        """A variant's card, with what it is: a name may say another alpha than the one served."""
        card = _bare_card(name)
        if name in cards:
            card = cards[name]
        elif cards and self._variants.is_of_dial(name):
            # It does not list every name that it answers to; all are one model.
            card = {**next(iter(cards.values())), "id": name}
        facts = self._variants.facts(name)
        return card if facts is None else {**card, "rvec": _said(facts)}


def _bare_card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(time.time()), "owned_by": OWNER}


def _said(facts: VariantFacts) -> dict[str, Any]:
    said = {"alpha": facts.alpha, "vector": facts.vector, "fingerprint": facts.fingerprint}
    if facts.alpha_range is None:
        return said
    return {**said, "alpha_range": list(facts.alpha_range)}
