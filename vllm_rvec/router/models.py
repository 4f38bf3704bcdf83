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
    from collections.abc import Iterable

    from vllm_rvec.router.variants import Upstream, VariantFacts, VariantTable

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
        variants: What there is.
        client: What upstreams are asked with.
    """

    def __init__(self, variants: VariantTable, client: aiohttp.ClientSession) -> None:
        self._variants = variants
        self._client = client

    async def list_models(self, _request: web.Request) -> web.Response:
        """All variants that are ready, in OpenAI's list shape.

        Returns:
            A card each: the engine's own where it gives one, else a bare one. One engine that
            does not answer spoils only its own cards.
        """
        ready = {name: self._variants.find(name) for name in self._ready_names()}
        cards = await self._cards(set(ready.values()))
        data = [self._card(name, cards[upstream]) for name, upstream in ready.items()]
        return web.json_response({"object": "list", "data": data})

    async def get_model(self, request: web.Request) -> web.Response:
        """The card of one variant.

        Raises:
            UnknownVariantError: If there is no such variant.
            VariantDownError: If it is down.
        """
        name = request.match_info["name"]
        upstream = self._variants.find(name)
        return web.json_response(self._card(name, await self._ask(upstream)))

    async def get_health(self, _request: web.Request) -> web.Response:
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

    def _ready_names(self) -> list[str]:
        names = self._variants.names()
        return [name for name in names if self._variants.down_reason(name) is None]

    async def _cards(self, upstreams: Iterable[Upstream]) -> dict[Upstream, dict[str, Any]]:
        """Each upstream's cards by name, asked at once, each upstream once."""
        asked = list(upstreams)
        return dict(zip(asked, await asyncio.gather(*map(self._ask, asked)), strict=True))

    async def _ask(self, upstream: Upstream) -> dict[str, Any]:
        """An upstream's cards by name; empty where it doesn't give them."""
        try:
            async with self._client.get(
                upstream.base_url.rstrip("/") + "/v1/models",
                headers=bearer(upstream),
                timeout=aiohttp.ClientTimeout(total=CARD_SECONDS),
            ) as answer:
                cards = _CardList.model_validate_json(await answer.read()).data
        except (aiohttp.ClientError, TimeoutError, ValidationError) as exc:
            logger.warning("no model list from %s: %s", upstream, type(exc).__name__)
            return {}
        return {card.id: card.model_dump() for card in cards}

    def _card(self, name: str, cards: dict[str, Any]) -> dict[str, Any]:
        """A variant's card, with what it is: a name may say another alpha than the one served."""
        card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": OWNER}
        if name in cards:
            card = cards[name]
        elif cards and self._variants.dial is not None:
            # It does not list every name that it answers to; all are one model.
            card = {**next(iter(cards.values())), "id": name}
        facts = self._variants.facts(name)
        return card if facts is None else {**card, "rvec": _said(facts)}


def _said(facts: VariantFacts) -> dict[str, Any]:
    said = {"alpha": facts.alpha, "vector": facts.vector}
    if facts.alpha_range is None:
        return said
    return {**said, "alpha_range": list(facts.alpha_range)}
