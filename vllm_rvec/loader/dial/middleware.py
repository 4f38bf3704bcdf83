"""Names and alphas in vLLM's own server: `--middleware`.

A request may say its alpha in the model's name, in the body or in a header (`vector/dial`). Here
it becomes what vLLM knows: the one served name, and `vllm_xargs: {"alpha": [...]}`. In the answer
the model is called again as it was asked for, `X-Rvec-Alpha` says what was used, and
`/v1/models` lists the variants.

vLLM puts this outside of its check for the API key. So nothing is read or answered here before what
is inside asks for the body, which only happens once the key was found to be right. Only an alpha in
a header on a path that has none is refused before that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from vllm_rvec.loader.config import LoaderConfig
from vllm_rvec.loader.dial.admission import AlphaAdmission
from vllm_rvec.vector.dial import ALPHA_HEADER, ALPHA_KEY, VARIANT_HEADER, AlphaRequestError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from vllm_rvec.vector.dial import Alphas, Dial

__all__ = ["DialMiddleware"]

MODELS_PATH: Final = "/v1/models"
GENERATING_PATHS: Final = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
)
NAMING_PATHS: Final = frozenset({"/tokenize", "/detokenize", "/v1/messages/count_tokens"})
"""These name a model, and compute nothing with its weights."""
SHOWN_CHARACTERS: Final = 100


@dataclass(frozen=True, slots=True)
class _Refusal:
    status: int
    message: str
    param: str
    code: str

    def response(self) -> JSONResponse:
        error = {"message": self.message, "type": "invalid_request_error"}
        return JSONResponse(
            {"error": error | {"param": self.param, "code": self.code}}, status_code=self.status
        )


class DialMiddleware:
    """Reads which alphas a request wants.

    Args:
        app: vLLM's server, or what is between.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._served = ""
        self._dial: Dial | None = None
        self._default: Alphas = ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or pass it on."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        method = scope.get("method")
        is_ours = method == "POST" and path in GENERATING_PATHS | NAMING_PATHS
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        dial = self._find_dial(scope)
        if method == "GET" and path == MODELS_PATH:
            await self.app(scope, receive, _CardSender(self, dial, send))
            return
        if not is_ours:
            refusal = _no_alpha_here(scope, path, dial, self._default)
            await (refusal or self.app)(scope, receive, send)
            return
        exchange = _Exchange(self, dial, scope, path in GENERATING_PATHS)
        await self.app(scope, exchange.receiver(receive), exchange.sender(send))

    def _find_dial(self, scope: Scope) -> Dial:
        """The engine's, from its configuration; once, as vLLM has none when this is made."""
        if self._dial is None:
            state = scope["app"].state
            config = state.engine_client.vllm_config
            options, _ = LoaderConfig.split(config.load_config.model_loader_extra_config)
            self._served = state.openai_serving_models.model_name()
            self._dial = AlphaAdmission.dial = options.dial
            self._default = options.default_alphas
        return self._dial

    @property
    def served(self) -> str:
        """The one name that vLLM knows."""
        return self._served

    @property
    def default(self) -> Alphas:
        """Of requests that name neither a variant nor alphas."""
        return self._default


@dataclass(slots=True)
class _Exchange:
    """One request and its answer."""

    middleware: DialMiddleware
    dial: Dial
    scope: Scope
    is_generating: bool
    alphas: Alphas = ()
    asked: str = ""
    """The model's name, where it is another than vLLM's."""
    refusal: _Refusal | None = None
    _body: list[bytes] = field(default_factory=list)
    _start: Message | None = None
    _is_answered: bool = False

    def receiver(self, receive: Receive) -> Receive:
        """What the server reads the body from: rewritten when its last part has come."""

        async def read() -> Message:
            while (message := await receive())["type"] == "http.request":
                self._body.append(message.get("body", b""))
                if not message.get("more_body", False):
                    body, self._body = b"".join(self._body), []
                    return {"type": "http.request", "body": self._rewritten(body)}
            return message

        return read

    def _rewritten(self, body: bytes) -> bytes:
        try:
            given = json.loads(body)
        except ValueError:
            return body  # vLLM says what is wrong with it
        if not isinstance(given, dict):
            return body
        try:
            self._read(given)
        except AlphaRequestError as exc:
            self.refusal = _Refusal(400, str(exc), ALPHA_KEY, "invalid_alpha")
        return b"" if self.refusal else json.dumps(given).encode()

    def _read(self, given: dict[str, Any]) -> None:
        """Take alphas and name out of a body, and put in what vLLM knows."""
        if given.get("use_beam_search"):
            # vLLM makes the requests of its beams anew, without what the first one carried.
            message = "Beam search can't be used here: its beams would lose their alpha."
            self.refusal = _Refusal(400, message, "use_beam_search", "unsupported_parameter")
            return
        headers = Headers(scope=self.scope)
        name = headers.get(VARIANT_HEADER) or given.get("model")
        value = given.pop(ALPHA_KEY, None)
        named = self._of_name(name)
        if self.refusal:
            return
        given["model"] = self.middleware.served
        header = headers.get(ALPHA_HEADER)
        xargs = given.get("vllm_xargs")
        inner = xargs.get(ALPHA_KEY) if isinstance(xargs, dict) else None
        value = inner if value is None else value
        if value is not None:
            self.alphas = self.dial.of_value(value)
        elif header:
            self.alphas = self.dial.of_header(header)
        else:
            self.alphas = named
        if self.is_generating and (xargs is None or isinstance(xargs, dict)):
            given["vllm_xargs"] = {**(xargs or {}), ALPHA_KEY: list(self.alphas)}

    def _of_name(self, name: object) -> Alphas:
        if not name:
            return self.middleware.default
        if isinstance(name, str):
            if (alphas := self.dial.of_model(name)) is not None:
                self.asked = name
                return alphas
            if name == self.middleware.served:
                return self.middleware.default
        shown = str(name)[:SHOWN_CHARACTERS]
        names = ", ".join([*self.dial.variants, f"enhanced@A with A in {self.dial.allowed}"])
        message = f"The model `{shown}` does not exist. There are: {names}."
        self.refusal = _Refusal(404, message, "model", "model_not_found")
        return ()

    def sender(self, send: Send) -> Send:
        """What the server writes its answer to: ours goes out where the request was refused."""

        async def write(message: Message) -> None:
            if self.refusal is not None:
                if not self._is_answered:
                    self._is_answered = True
                    await self.refusal.response()(self.scope, _nothing, send)
                return
            if message["type"] != "http.response.start":
                await self._send_part(message, send)
                return
            headers = MutableHeaders(raw=message.setdefault("headers", []))
            if self.alphas:
                headers[ALPHA_HEADER] = self.dial.text(self.alphas)
            if "content-length" in headers:
                self._start = message  # its length is not known before its body
            else:
                await send(message)

        return write

    async def _send_part(self, message: Message, send: Send) -> None:
        if message["type"] != "http.response.body":
            await send(message)
            return
        body = self._named_as_asked(message.get("body", b""))
        if self._start is not None:
            start, self._start = self._start, None
            headers = MutableHeaders(raw=start["headers"])
            if message.get("more_body", False):
                del headers["content-length"]
            else:
                headers["content-length"] = str(len(body))
            await send(start)
        await send({**message, "body": body})

    def _named_as_asked(self, body: bytes) -> bytes:
        """Call the model as the client did.

        Inside of strings, quotes have a backslash before them: nothing that the model wrote can
        look like the field.
        """
        if not self.asked or self.asked == self.middleware.served:
            return body
        ours, theirs = (
            f'"model":{json.dumps(name, ensure_ascii=False)}'.encode()
            for name in (self.middleware.served, self.asked)
        )
        return body.replace(ours, theirs)


@dataclass(slots=True)
class _CardSender:
    """Lists the variants in the place of the one name that vLLM knows."""

    middleware: DialMiddleware
    dial: Dial
    send: Send
    _start: Message | None = None
    _body: list[bytes] = field(default_factory=list)

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        body = b"".join(self._body)
        if self._start is None:
            return
        if self._start["status"] == 200:
            listed = json.loads(body)
            listed["data"] = [card for given in listed["data"] for card in self._cards(given)]
            body = json.dumps(listed).encode()
        headers = MutableHeaders(raw=self._start.setdefault("headers", []))
        headers["content-length"] = str(len(body))
        await self.send(self._start)
        await self.send({"type": "http.response.body", "body": body})

    def _cards(self, card: dict[str, Any]) -> list[dict[str, Any]]:
        if card.get("id") != self.middleware.served or not self.dial.variants:
            return [card]
        return [
            {**card, "id": name, "rvec": self._facts(alphas)}
            for name, alphas in self.dial.variants.items()
        ]

    def _facts(self, alphas: Alphas) -> dict[str, Any]:
        same = len(set(alphas)) == 1
        named = dict(zip(self.dial.vectors, alphas, strict=True))
        return {
            "alpha": alphas[0] if same else named,
            "vectors": list(self.dial.vectors),
            "alpha_range": list(self.dial.allowed),
        }


def _no_alpha_here(scope: Scope, path: str, dial: Dial, default: Alphas) -> JSONResponse | None:
    """Refuse a header that would not be heard: other paths answer at the default alpha."""
    said = Headers(scope=scope).get(ALPHA_HEADER)
    if said is None or _is_default(said, dial, default):
        return None
    message = f"{ALPHA_HEADER} is not understood on {path[:SHOWN_CHARACTERS]}."
    return _Refusal(400, message, ALPHA_HEADER, "invalid_alpha").response()


def _is_default(said: str, dial: Dial, default: Alphas) -> bool:
    try:
        return dial.of_header(said) == default
    except AlphaRequestError:
        return False


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
