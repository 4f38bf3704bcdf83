"""`/v1/rvec/variants`, `/v1/rvec/aliases`: what there is, and changing alphas and weights live.

Who does the change is told to `create_app`; here are the key, the body, the door that is shut
meanwhile (`gate`), and the answer. With a dial nothing has to be done but here: the name stands for
other alphas from then on.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from aiohttp import web
from pydantic import AfterValidator, Field, JsonValue

from vllm_rvec.errors import ConfigError, RvecError
from vllm_rvec.router.alphas import invalid_alpha
from vllm_rvec.router.assignment import Reason
from vllm_rvec.router.bodies import read_model
from vllm_rvec.router.config import Weight, check_weights
from vllm_rvec.router.keyring import KeyConfig, Keyring, hash_key
from vllm_rvec.router.openai_errors import RequestRefusedError
from vllm_rvec.router.policy import Choice
from vllm_rvec.router.settings import Settings
from vllm_rvec.router.variants import UnknownVariantError
from vllm_rvec.vector.alpha import AlphaChange, AlphaNumber
from vllm_rvec.vector.dial import AlphaRequestError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vllm_rvec.router.request import Request
    from vllm_rvec.router.services import Services
    from vllm_rvec.vector.dial import Dial

    ChangeAlpha = Callable[[str, float], Awaitable["AlphaChange"]]

__all__ = ["ADMIN_PATHS", "ALIASES_PATH", "VARIANTS_PATH", "Admin", "AdminApi"]

logger = logging.getLogger("vllm_rvec.router")

VARIANTS_PATH = "/v1/rvec/variants"
ALIASES_PATH = "/v1/rvec/aliases"
ADMIN_PATHS = (VARIANTS_PATH, ALIASES_PATH)

HOW_TO_ENABLE = (
    "Start the server with an admin key: VLLM_RVEC_ADMIN_KEY, --admin-key, or its hash as "
    "`admin_key_sha256`."
)

ALPHA_EXAMPLE = 'Send {"alpha": 0.7}.'
WEIGHTS_EXAMPLE = 'Send {"split": {"base": 90, "enhanced@1": 10}}.'


@dataclass(frozen=True, slots=True)
class Admin:
    """Who may change variants, and how it is done."""

    keyring: Keyring = field(repr=False)
    """What must be shown, as `Authorization: Bearer ...`."""
    change_alpha: ChangeAlpha | None = None
    """Has a variant's engine serve another alpha. Called with nothing under way on it, and never
    with a dial. None where the engines are not ours."""
    drain_seconds: float = 30.0
    """How long requests under way may take to end before that."""

    @classmethod
    def of(
        cls,
        key: str | None,
        sha256: str | None,
        change_alpha: ChangeAlpha | None,
        drain_seconds: float,
    ) -> Admin | None:
        """Whoever shows the key, or one of this hash; None where there is neither.

        Raises:
            ConfigError: The key is empty.
        """
        found = sha256 if key is None else hash_key(key)
        return None if found is None else cls.of_hash(found, change_alpha, drain_seconds)

    @classmethod
    def of_hash(cls, sha256: str, change_alpha: ChangeAlpha | None, drain_seconds: float) -> Admin:
        """Whoever shows the key of this hash.

        Raises:
            ConfigError: It is the empty key's: that would look like protection and be none.
        """
        keyring = Keyring({"admin": KeyConfig(sha256=sha256)}, None)
        return cls(keyring, change_alpha, drain_seconds)

    def is_shown(self, request: Request) -> bool:
        """Whether a request shows the key."""
        return self.keyring.identify(request) is not None


class _Wish(Settings):
    """The body of a PUT."""

    alpha: AlphaNumber


class _DialWish(Settings):
    """The body of a PUT to a dial's variant, which may say an alpha for each vector."""

    alpha: JsonValue


class _Weights(Settings):
    """The body of a PUT to an alias."""

    split: Annotated[dict[str, Weight], Field(min_length=1), AfterValidator(check_weights)]


class AdminApi:
    """The handlers.

    Args:
        services: What there is.
        admin: Who may change it; without it, nobody.
    """

    def __init__(self, services: Services, admin: Admin | None) -> None:
        self._services = services
        self._variants = services.variants
        self._admin = admin
        self._running: dict[str, asyncio.Task[dict[str, Any]]] = {}

    async def list_variants(self, _request: Request) -> web.Response:
        """Every variant, ready or not."""
        data = [self._describe(name) for name in self._variants.names()]
        return web.json_response({"object": "list", "data": data})

    async def get_variant(self, request: Request) -> web.Response:
        """One variant.

        Raises:
            UnknownVariantError: If there is no such variant.
        """
        return web.json_response(self._describe(self._named(request)))

    async def put_variant(self, request: Request) -> web.Response:
        """Change a variant's alpha; goes on to its end when the client goes away.

        Raises:
            RequestRefusedError: It may not be done, or the body is wrong.
            UnknownVariantError: If there is no such variant.
            VariantDownError: It can't answer now, so there is nothing to change.
            AlphaChangeRefusedError: Nothing was changed.
            AlphaChangeFailedError: The variant is down, and comes back with its old alpha.
        """
        admin = self._allowed(request)
        name = self._named(request)
        request.exchange.choice = Choice(name, Reason.EXPLICIT)
        if (dial := self._variants.dial) is not None and name in dial.variants:
            wish = await read_model(request, _DialWish, fix=ALPHA_EXAMPLE)
            return web.json_response(self._retune(dial, name, wish.alpha))
        alpha = (await read_model(request, _Wish, fix=ALPHA_EXAMPLE)).alpha
        if name in self._running:
            raise RequestRefusedError(
                409,
                f"Another change of `{name}` is under way.",
                code="change_in_progress",
                fix="Wait for its end, then ask again.",
            )
        if admin.change_alpha is None:
            raise RequestRefusedError(
                409,
                f"The engine of `{name}` is not this server's own.",
                code="not_our_engine",
                fix="Change it where it was started.",
            )
        task = asyncio.create_task(self._change(admin.change_alpha, name, alpha, admin))
        self._running[name] = task
        task.add_done_callback(lambda done: self._forget(name, done))
        return web.json_response(await asyncio.shield(task))

    async def list_aliases(self, _request: Request) -> web.Response:
        """Every alias, with its weights as they are now."""
        aliases = self._services.traffic.routing.aliases
        data = [self._describe_alias(name) for name in aliases]
        return web.json_response({"object": "list", "data": data})

    async def get_alias(self, request: Request) -> web.Response:
        """One alias.

        Raises:
            UnknownAliasError: If there is no such alias.
        """
        return web.json_response(self._describe_alias(request.match_info["name"]))

    async def put_alias(self, request: Request) -> web.Response:
        """Change a split, of requests that come from now on, until the configured one changes.

        Raises:
            RequestRefusedError: It may not be done, the body is wrong, or a variant is not there.
            UnknownAliasError: If there is no such alias.
        """
        self._allowed(request)
        name = request.match_info["name"]
        old = dict(self._services.traffic.weights(name))
        wish = await read_model(request, _Weights, fix=WEIGHTS_EXAMPLE)
        try:
            self._services.set_weights(name, wish.split)
        except ConfigError as exc:
            raise RequestRefusedError(
                400, exc.what, code="unknown_variant", param="split", fix=exc.fix
            ) from exc
        logger.info("split of %s changed from %s to %s", name, old, wish.split)
        return web.json_response({**self._describe_alias(name), "old_split": old})

    def _describe_alias(self, name: str) -> dict[str, Any]:
        weights = self._services.traffic.weights(name)
        return {"id": name, "object": "rvec.alias", "split": dict(weights)}

    async def _change(
        self, change_alpha: ChangeAlpha, name: str, alpha: float, admin: Admin
    ) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        started = loop.time()
        self._variants.find(name)
        async with self._variants.gate(name).shut(admin.drain_seconds):
            drained = loop.time()
            changed = await change_alpha(name, alpha)
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
            raise invalid_alpha(str(exc), fix=ALPHA_EXAMPLE) from None
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

    def _allowed(self, request: Request) -> Admin:
        if self._admin is None:
            raise RequestRefusedError(
                403, "Nobody may change variants here.", code="admin_disabled", fix=HOW_TO_ENABLE
            )
        if not self._admin.is_shown(request):
            raise RequestRefusedError(
                401, "The admin key is missing or wrong.", code="invalid_admin_key"
            )
        return self._admin

    def _named(self, request: Request) -> str:
        name, names = request.match_info["name"], self._variants.names()
        if name not in names:
            raise UnknownVariantError(name, names)
        return name

    def _describe(self, name: str) -> dict[str, Any]:
        reason, facts = self._variants.down_reason(name), self._variants.facts(name)
        state = "ready" if reason is None else "down"
        if self._variants.gate(name).is_shut:
            state = "changing"
        range_ = self._variants.alpha_range if self._variants.is_of_dial(name) else None
        return {
            "id": name,
            "object": "rvec.variant",
            "state": state,
            "reason": reason,
            "alpha": facts.alpha if facts else None,
            "vector": facts.vector if facts else None,
            "fingerprint": facts.fingerprint if facts else None,
            **({} if range_ is None else {"alpha_range": list(range_)}),
        }
