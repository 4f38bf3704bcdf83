"""Which of an engine's paths pass through the router, and what is known of each.

A list of what is allowed: engines also have paths that put them to sleep, load adapters or change
their weights. Those are named too, each with its reason, so that a refusal says more than "not
found". A test holds the three lists against all routes of the installed vLLM. Routing itself is
not here, nor is the reading of JSON bodies.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "DENIED",
    "FORWARDED",
    "MODEL_HEADERS",
    "OWN",
    "ForwardedPath",
    "Kind",
    "denial",
    "read_form_model",
]


class Kind(StrEnum):
    """Where a request says which model it is for."""

    BODY = "body"
    """`model` of a JSON object."""
    FORM = "form"
    """The field `model` of a multipart form."""
    OWNER = "owner"
    """Nowhere: the path names a stored response, which only the engine that made it has."""


@dataclass(frozen=True, slots=True)
class ForwardedPath:
    """A path of the engine that clients may use."""

    method: str
    """The HTTP method."""
    template: str
    """The path as vLLM and aiohttp write it; `{response_id}` stands for one segment."""
    kind: Kind
    """Where the model is named."""
    is_generating: bool = False
    """Whether the model writes, says or decides something: such an answer can be judged."""
    is_stateful: bool = False
    """Whether the engine may keep something of it, or change what it keeps."""


def _generating(template: str) -> ForwardedPath:
    return ForwardedPath("POST", template, Kind.BODY, is_generating=True)


def _spoken(template: str) -> ForwardedPath:
    return ForwardedPath("POST", template, Kind.FORM, is_generating=True)


def _computing(template: str) -> ForwardedPath:
    return ForwardedPath("POST", template, Kind.BODY)


FORWARDED: Final[tuple[ForwardedPath, ...]] = (
    _generating("/v1/chat/completions"),
    _generating("/v1/chat/completions/batch"),
    _generating("/v1/completions"),
    _generating("/v1/messages"),
    _generating("/cohere/v2/chat"),
    _generating("/inference/v1/generate"),
    _generating("/invocations"),
    _generating("/generative_scoring"),
    _generating("/v1/systemone"),
    _spoken("/v1/audio/transcriptions"),
    _spoken("/v1/audio/translations"),
    ForwardedPath("POST", "/v1/responses", Kind.BODY, is_generating=True, is_stateful=True),
    ForwardedPath("GET", "/v1/responses/{response_id}", Kind.OWNER),
    ForwardedPath("POST", "/v1/responses/{response_id}/cancel", Kind.OWNER, is_stateful=True),
    _computing("/v1/embeddings"),
    _computing("/v2/embed"),
    _computing("/pooling"),
    _computing("/classify"),
    _computing("/score"),
    _computing("/v1/score"),
    _computing("/rerank"),
    _computing("/v1/rerank"),
    _computing("/v2/rerank"),
    _computing("/tokenize"),
    _computing("/detokenize"),
    _computing("/v1/messages/count_tokens"),
    _computing("/v1/chat/completions/render"),
    _computing("/v1/completions/render"),
    _computing("/v1/messages/render"),
    _computing("/v1/responses/render"),
    _computing("/cohere/v2/chat/render"),
    _computing("/v1/chat/completions/derender"),
    _computing("/v1/completions/derender"),
)
"""All that reaches an engine. It answers 404 itself for what its model has no use for."""

MODEL_HEADERS: Final = frozenset(
    {"x-amzn-sagemaker-adapter-identifier", "x-amzn-sagemaker-session-id"}
)
"""Headers that no engine may get: on `/invocations` the first takes the place of the body's
`model`, behind the router's back, and the second names a session that one engine alone has."""

OWN: Final = frozenset({"/v1/models", "/health", "/readyz", "/metrics"})
"""Paths of engines that the router answers itself, for all of them at once."""

_OTHERS = "it acts on requests of other clients"
_WEIGHTS = "it changes an engine's weights"
_ADAPTERS = "it loads or unloads adapters in an engine"
_SLEEP = "it puts an engine to sleep or wakes it"
_CACHE = "it empties an engine's caches for everybody"
_SCALING = "it changes how many workers an engine has"
_PROFILING = "it has an engine write profiles to its disk"
_ONE_ENGINE = "it tells about one engine and names no model; ask that engine itself"
_DOCS = "it describes an engine's own server, most of which is not reachable here"
_FAULTS = "it is for whoever runs the engine, to recover it"

DENIED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "/abort_requests": _OTHERS,
        "/inference/v1/abort_requests": _OTHERS,
        "/pause": "it stops an engine for everybody",
        "/resume": "it lets a paused engine go on",
        "/is_paused": _ONE_ENGINE,
        "/sleep": _SLEEP,
        "/wake_up": _SLEEP,
        "/release_kv_cache_memory": _SLEEP,
        "/is_sleeping": _ONE_ENGINE,
        "/collective_rpc": "it runs any method in an engine's workers",
        "/init_weight_transfer_engine": _WEIGHTS,
        "/shutdown_weight_transfer_engine": _WEIGHTS,
        "/start_weight_update": _WEIGHTS,
        "/start_draft_weight_update": _WEIGHTS,
        "/update_weights": _WEIGHTS,
        "/finish_weight_update": _WEIGHTS,
        "/update_weight_version": _WEIGHTS,
        "/weight_info": _ONE_ENGINE,
        "/weight_checker": "it reads all of an engine's weights, and can change them",
        "/get_world_size": _ONE_ENGINE,
        "/v1/rvec/alpha": (
            "it changes an engine's alpha behind the router's back; use PUT /v1/rvec/variants/NAME"
        ),
        "/v1/load_lora_adapter": _ADAPTERS,
        "/v1/unload_lora_adapter": _ADAPTERS,
        "/adapters": _ADAPTERS,
        "/scale_elastic_ep": _SCALING,
        "/is_scaling_elastic_ep": _ONE_ENGINE,
        "/reset_prefix_cache": _CACHE,
        "/reset_mm_cache": _CACHE,
        "/reset_encoder_cache": _CACHE,
        "/start_profile": _PROFILING,
        "/stop_profile": _PROFILING,
        "/fault_tolerance": _FAULTS,
        "/server_info": _ONE_ENGINE,
        "/kv_event_sources": _ONE_ENGINE,
        "/load": _ONE_ENGINE,
        "/version": _ONE_ENGINE,
        "/tokenizer_info": _ONE_ENGINE,
        "/ping": "it is SageMaker's probe of one engine; the router's own is /health",
        "/ready": "it is the probe of one engine; the router's own is /readyz",
        "/docs": _DOCS,
        "/redoc": _DOCS,
        "/openapi.json": _DOCS,
        "/static": _DOCS,
        "/v1/realtime": "it is a WebSocket, and the router speaks HTTP only",
    }
)
"""Paths of engines that are kept from clients, all that lies below them included, and why."""

MAX_SEGMENTS: Final = 8
"""More than any path in `DENIED` has."""


def denial(path: str) -> str | None:
    """Why a path of the engine is kept from clients.

    Args:
        path: What was asked for, decoded.

    Returns:
        The reason, to follow "because"; None where the path is none of these.

    >>> denial("/v1/realtime")
    'it is a WebSocket, and the router speaks HTTP only'
    """
    head, below = "", [part for part in path.split("/", MAX_SEGMENTS) if part]
    for part in below:
        head += f"/{part}"
        if (reason := DENIED.get(head)) is not None:
            return reason
    return None


MAX_PARTS: Final = 2_000
"""As many fields and files as vLLM's server takes in one form. It counts look-alikes of a boundary
too: the time to read a form stays bounded."""

MAX_PART_HEADER_BYTES: Final = 8_192

MAX_NAME_BYTES: Final = 1_024
"""Longer than the name of any model."""

OPTION: Final = re.compile(
    rb';[ \t]*+([^\s;="]++)=("(?:[^"\\]|\\.)*+"|[^\s;"]*+)[ \t]*+', re.DOTALL
)

BOUNDARY: Final = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
"""RFC 2046, 5.1.1."""


def read_form_model(body: bytes, content_type: str) -> str | None:
    r"""Find the field `model` of a multipart form, without reading its files.

    Whatever two readers could understand differently counts as not readable, so that an engine
    never finds another model in the form than the router did.

    Args:
        body: The whole form.
        content_type: The header that came with it, which has the boundary.

    Returns:
        The name; None if there is none, or two, or the form can't be read.

    >>> part = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nbase\r\n--b--\r\n'
    >>> read_form_model(part, "multipart/form-data; boundary=b")
    'base'
    """
    boundary = _boundary_of(content_type)
    if boundary is None:
        return None
    try:
        found = [value for value in _model_values(body, boundary) if value]
    except _UnreadableError:
        return None
    return found[0] if len(found) == 1 else None


class _UnreadableError(ValueError):
    """A form that is cut off, or could be read in two ways."""


def _boundary_of(content_type: str) -> bytes | None:
    if not content_type.isascii() or len(content_type) > MAX_PART_HEADER_BYTES:
        return None
    try:
        media_type, options = _read_options(content_type.encode().rstrip(b"; \t"))
    except _UnreadableError:
        return None
    boundary = options.get(b"boundary", b"")
    is_form = media_type == b"multipart/form-data" and BOUNDARY.fullmatch(boundary)
    return boundary if is_form else None


def _model_values(body: bytes, boundary: bytes) -> Iterator[str]:
    """The value of every part whose name is `model`."""
    for head, start, end in _parts(body, b"\r\n--" + boundary):
        options = _disposition(body[head:start])
        if options.get(b"name") != b"model":
            continue
        if b"filename" in options or end - start > MAX_NAME_BYTES:
            raise _UnreadableError
        try:
            yield body[start:end].decode()
        except UnicodeDecodeError as exc:
            raise _UnreadableError from exc


def _parts(body: bytes, delimiter: bytes) -> Iterator[tuple[int, int, int]]:
    """Where each part's headers begin, its content begins, and its content ends."""
    at = len(delimiter) - 2
    if body[:at] != delimiter[2:]:
        raise _UnreadableError
    for _ in range(MAX_PARTS):
        if body.startswith(b"--", at):
            return
        blank = body.find(b"\r\n\r\n", at, at + MAX_PART_HEADER_BYTES)
        if not body.startswith(b"\r\n", at) or blank < 0:
            raise _UnreadableError
        start = blank + 4
        end = _end_of_part(body, delimiter, start)
        yield at + 2, start, end
        at = end + len(delimiter)
    raise _UnreadableError


def _end_of_part(body: bytes, delimiter: bytes, start: int) -> int:
    """The next boundary. One that goes on in another way than a boundary can is content."""
    end = start
    for _ in range(MAX_PARTS):
        if (end := body.find(delimiter, end)) < 0:
            break
        if body.startswith((b"\r\n", b"--"), end + len(delimiter)):
            return end
        end += len(delimiter)
    raise _UnreadableError


def _disposition(headers: bytes) -> Mapping[bytes, bytes]:
    """The options of a part's one `Content-Disposition`."""
    lines = [line.partition(b":") for line in headers.rstrip(b"\r\n").split(b"\r\n")]
    values = [value for name, _, value in lines if name.lower() == b"content-disposition"]
    if len(values) != 1:
        raise _UnreadableError
    return _read_options(values[0].strip(b" \t"))[1]


def _read_options(header: bytes) -> tuple[bytes, Mapping[bytes, bytes]]:
    """Take `form-data; name="model"` apart."""
    value, semicolon, rest = header.partition(b";")
    options: dict[bytes, bytes] = {}
    at, text = 0, semicolon + rest
    while at < len(text):
        if (match := OPTION.match(text, at)) is None:
            raise _UnreadableError
        name, option = match[1].lower(), match[2]
        if name in options:
            raise _UnreadableError
        options[name] = option[1:-1] if option.startswith(b'"') else option
        at = match.end()
    return value.strip(b" \t").lower(), options
