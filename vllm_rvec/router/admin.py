"""`/v1/rvec/variants`: what each variant is, and changing its alpha while it serves.

Who does the change is told to `create_app`; here are the key, the body, the door that is shut
meanwhile (`gate`), and the answer. With a dial nothing has to be done but here: the name stands for
other alphas from then on.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from vllm_rvec.errors import ConfigError, RvecError
from vllm_rvec.router.alphas import invalid_alpha
from vllm_rvec.router.keys import shows_key
from vllm_rvec.router.openai_errors import RequestRefusedError
from vllm_rvec.router.proxy import VARIANT
from vllm_rvec.router.variants import UnknownVariantError
from vllm_rvec.vector.alpha import AlphaChange, AlphaNumber
from vllm_rvec.vector.dial import AlphaRequestError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vllm_rvec.router.variants import VariantTable
    from vllm_rvec.vector.dial import Dial

    ChangeAlpha = Callable[[str, float], Awaitable["AlphaChange"]]

__all__ = ["ADMIN_PATH", "Admin", "AdminApi"]

logger = logging.getLogger("vllm_rvec.router")

ADMIN_PATH = "/v1/rvec/variants"

HOW_TO_ENABLE = (
    "Start the server with an admin key: VLLM_RVEC_ADMIN_KEY, --admin-key or `admin_key`."
)

MAX_WISH_BYTES = 10_000


@dataclass(frozen=True, slots=True)
class Admin:
    """Who may change variants, and how it is done."""

    key: str = field(repr=False)
    """What must be shown, as `Authorization: Bearer ...`. Kept out of `repr`, so out of logs."""
    change_alpha: ChangeAlpha
    """Has a variant's engine serve another alpha. Called with nothing under way on it, and never
    with a dial."""
    drain_seconds: float
    """How long requests under way may take to end before that."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


class _Wish(_Strict):
    """The body of a PUT."""

    alpha: AlphaNumber


class _DialWish(_Strict):
    """The body of a PUT to a dial's variant, which may say an alpha for each vector."""

    alpha: JsonValue


WishT = TypeVar("WishT", bound=_Strict)


class AdminApi:
    """The handlers.

    Args:
        variants: What there is.
        admin: Who may change it; without it, nobody.

    Raises:
        ConfigError: The key is empty: that would look like protection and be none.
    """

    def __init__(self, variants: VariantTable, admin: Admin | None) -> None:
        if admin is not None and not admin.key:
            raise ConfigError("The admin key is empty.", fix="Set a key, or none at all.")
        self._variants = variants
        self._admin = admin
        self._running: dict[str, asyncio.Task[dict[str, Any]]] = {}

    async def list_variants(self, _request: web.Request) -> web.Response:
        """Every variant, ready or not."""
        data = [self._describe(name) for name in self._variants.names()]
        return web.json_response({"object": "list", "data": data})

    async def get_variant(self, request: web.Request) -> web.Response:
        """One variant.

        Raises:
            UnknownVariantError: If there is no such variant.
        """
        return web.json_response(self._describe(self._named(request)))

    async def put_variant(self, request: web.Request) -> web.Response:
        """Change a variant's alpha; goes on to its end when the client goes away.

        Raises:
            RequestRefusedError: It may not be done, or the body is wrong.
            UnknownVariantError: If there is no such variant.
            VariantDownError: It can't answer now, so there is nothing to change.
            AlphaChangeRefusedError: Nothing was changed.
            AlphaChangeFailedError: The variant is down, and comes back with its old alpha.
        """
        admin = self._allowed(request)
        name = request[VARIANT] = self._named(request)
        if (dial := self._variants.dial) is not None:
            wish = await _read_wish(request, _DialWish)
            return web.json_response(self._retune(dial, name, wish.alpha))
        alpha = (await _read_wish(request, _Wish)).alpha
        if name in self._running:
            raise RequestRefusedError(
                409,
                f"Another change of `{name}` is under way.",
                code="change_in_progress",
                fix="Wait for its end, then ask again.",
            )
        task = asyncio.create_task(self._change(admin, name, alpha))
        self._running[name] = task
        task.add_done_callback(lambda done: self._forget(name, done))
        return web.json_response(await asyncio.shield(task))

    async def _change(self, admin: Admin, name: str, alpha: float) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        started = loop.time()
        self._variants.find(name)
        async with self._variants.gate(name).shut(admin.drain_seconds):
            drained = loop.time()
            changed = await admin.change_alpha(name, alpha)
        logger.info("alpha of %s changed from %s to %s", name, changed.old_alpha, changed.alpha)
        return {
            **self._describe(name),
            **asdict(changed),
            "drain_seconds": round(drained - started, 3),
            "reload_seconds": round(changed.reload_seconds, 3),
            "seconds": round(loop.time() - started, 3),
        }

    def _retune(self, dial: Dial, name: str, value: JsonValue) -> dict[str, Any]:
        """Have a dial's variant stand for other alphas; its requests under way keep theirs."""
        try:
            alphas = dial.of_value(value)
        except AlphaRequestError as exc:
            raise invalid_alpha(str(exc), fix='Send {"alpha": 0.7}.') from None
        old = dial.variants[name]
        self._variants.retune(name, alphas)
        logger.info("alpha of %s changed from %s to %s", name, dial.text(old), dial.text(alphas))
        if dial.with_variant(name, alphas).is_misnamed(name):
            said = dial.text(alphas)
            logger.warning("%s is no longer what its name says: its alpha is %s", name, said)
        return {
            **self._describe(name),
            "old_alpha": dial.plain(old),
            "alpha": dial.plain(alphas),
            **dict.fromkeys(("ranks", "copies"), 0),
            **dict.fromkeys(("drain_seconds", "reload_seconds", "seconds"), 0.0),
        }

    def _forget(self, name: str, done: asyncio.Task[dict[str, Any]]) -> None:
        del self._running[name]
        if done.cancelled():
            return
        # Here as well as to the client, who may have gone.
        if (error := done.exception()) is not None:
            what = error.what if isinstance(error, RvecError) else type(error).__name__
            trace = None if isinstance(error, RvecError) else error
            logger.warning("alpha of %s not changed: %s", name, what, exc_info=trace)

    def _allowed(self, request: web.Request) -> Admin:
        if self._admin is None:
            raise RequestRefusedError(
                403, "Nobody may change variants here.", code="admin_disabled", fix=HOW_TO_ENABLE
            )
        if not shows_key(request, self._admin.key):
            raise RequestRefusedError(
                401, "The admin key is missing or wrong.", code="invalid_admin_key"
            )
        return self._admin

    def _named(self, request: web.Request) -> str:
        name, names = request.match_info["name"], self._variants.names()
        if name not in names:
            raise UnknownVariantError(name, names)
        return name

    def _describe(self, name: str) -> dict[str, Any]:
        reason, facts = self._variants.down_reason(name), self._variants.facts(name)
        state = "ready" if reason is None else "down"
        if self._variants.gate(name).is_shut:
            state = "changing"
        range_ = self._variants.alpha_range
        return {
            "id": name,
            "object": "rvec.variant",
            "state": state,
            "reason": reason,
            "alpha": facts.alpha if facts else None,
            "vector": facts.vector if facts else None,
            **({} if range_ is None else {"alpha_range": list(range_)}),
        }


async def _read_wish(request: web.Request, kind: type[WishT]) -> WishT:
    if (request.content_length or 0) > MAX_WISH_BYTES:
        raise web.HTTPRequestEntityTooLarge(MAX_WISH_BYTES)
    try:
        return kind.model_validate_json(await request.read())
    except web.RequestPayloadError as exc:
        raise RequestRefusedError(400, "The body was cut off.", code="invalid_body") from exc
    except ValidationError as exc:
        problems = exc.errors(include_url=False, include_input=False)
    named = [f"{'.'.join(map(str, p['loc'])) or 'body'}: {p['msg']}" for p in problems]
    raise RequestRefusedError(
        400,
        f"The body can't be used: {'; '.join(named)}.",
        code="invalid_body",
        param="alpha",
        fix='Send {"alpha": 0.7}.',
    )
