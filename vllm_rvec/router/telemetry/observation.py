"""What is measured of one answer while its bytes pass; they are neither changed nor held up.

A chunk costs next to nothing: few bytes are looked at, and JSON is read once, at the end.
That works because in JSON a quote or a line end inside a string is always escaped: no text that a
model writes can look like `"usage": {` or like the begin of another event's line.

vLLM tells the tokens of a stream only when asked (`stream_options.include_usage`, or the engine's
`--enable-force-include-usage`); otherwise they are unknown here too. Tokens are never counted here.
"""

from __future__ import annotations

import json
import re
from enum import StrEnum
from time import perf_counter
from typing import TYPE_CHECKING

from vllm_rvec.router.telemetry.latencies import INTER_TOKEN_BUCKETS, Latencies

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["Observation", "Outcome"]

KEPT_BYTES = 64 * 2**10
"""The most that is kept of a body, of a begun event, or of an event with `usage` in it."""

OVERLAP_BYTES = 4 * 2**10
"""What of a body is searched twice, so that a `usage` is found where it was cut."""

MAX_TOKENS = 2**53
"""More is no count of tokens."""

USAGE = re.compile(rb'"usage"\s*:\s*(?=\{)')

ERROR_LINE = re.compile(
    rb"^(?:event: ?(?:error|response\.failed)$"
    rb'|data: ?\{\s*"error"\s*:\s*[^\sn]'
    rb'|data: ?\{\s*"(?:type|object)"\s*:\s*"(?:error|response\.failed)")',
    re.MULTILINE,
)
"""How an engine says inside a 200 that it failed: OpenAI's chat and completions, messages,
responses. `"error": null` is none."""

ROLE = re.compile(rb'"role"\s*:\s*"')
TEXT = re.compile(
    rb'"(?:content|reasoning|reasoning_content)"\s*:\s*"[^"]|"tool_calls"\s*:\s*\[\s*\{'
)
NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')

DONE = b"[DONE]\n\n"

DECODER = json.JSONDecoder()

UNUSUAL = (
    b"event: error",
    b"event: response.failed",
    b"event: message_delta",
    b'data: {"error',
    b'data:{"error',
    b'data: {"type":"error',
    b'data: {"object":"error',
    b"data: [DONE]",
    b":",
)
"""Begins of events that are looked at closer. One that is written in another way is an event too
many in the latencies; an error is found at the end all the same, if only `[DONE]` follows."""

NAME_BYTES = 80
"""The name of an event stands within."""


class Outcome(StrEnum):
    """How an answer ended, as far as the router is concerned."""

    COMPLETE = "complete"
    """The upstream ended it; that may be a complete error."""
    BROKEN = "broken"
    """The upstream broke off in the middle of it."""
    CLIENT_GONE = "client_gone"
    """The client left before its end."""


class Observation:
    """One answer, from the request's arrival to its end.

    Args:
        clock: Seconds that never go back.
        started: When the request came, by this clock; now where it isn't given.
    """

    __slots__ = (
        "_before_last",
        "_begun",
        "_body",
        "_clock",
        "_earlier_usage",
        "_ended",
        "_event_end",
        "_event_lines",
        "_first_byte",
        "_first_token",
        "_gaps",
        "_has_error_event",
        "_is_flowing",
        "_is_named",
        "_is_stream",
        "_last",
        "_last_token",
        "_started",
        "completion_tokens",
        "outcome",
        "prompt_tokens",
        "status",
    )

    def __init__(
        self, clock: Callable[[], float] = perf_counter, started: float | None = None
    ) -> None:
        self._clock = clock
        self._started = clock() if started is None else started
        self._ended: float | None = None
        self._is_stream = False
        self._is_named: bool | None = None
        self._begun = b""
        self._body = b""
        self._first_byte: float | None = None
        self._first_token: float | None = None
        self._last_token = 0.0
        # In messages the first event has the prompt's tokens.
        self._earlier_usage = b""
        # Whole events, of which the last two chunks are kept: `usage` comes at the end.
        self._last = b""
        self._before_last = b""
        self._is_flowing = False
        self._event_lines = 0
        self._event_end = b""
        self._gaps: Latencies | None = None
        self._has_error_event = False
        self.status: int | None = None
        """The answer's HTTP status; None where no answer began."""
        self.outcome: Outcome | None = None
        """How it ended; None while it hasn't."""
        self.prompt_tokens: int | None = None
        """Tokens of the prompt, those from a cache included; known at the end, if ever."""
        self.completion_tokens: int | None = None
        """Tokens generated; known at the end, if ever."""

    @property
    def is_stream(self) -> bool:
        """Whether the answer is an event stream."""
        return self._is_stream

    @property
    def has_error_event(self) -> bool:
        """Whether an event of the stream says that the engine failed."""
        return self._has_error_event

    @property
    def has_error(self) -> bool:
        """Whether the client got no whole answer for any reason but its own leaving."""
        is_refused = self.status is not None and self.status >= 400
        return is_refused or self._has_error_event or self.outcome is Outcome.BROKEN

    @property
    def ttft_seconds(self) -> float | None:
        """Time to the first generated event of a stream, or to the first byte of any other answer.

        A chat's first event names only the role and doesn't count, as long as another follows;
        neither do those of messages and responses that only open a block.
        """
        first = self._first_token
        if first is None and not (self._is_stream and self._has_error_event):
            first = self._first_byte
        return None if first is None else first - self._started

    @property
    def inter_token_latencies(self) -> Latencies | None:
        """Time between generated events, the nearest to tokens that can be seen from here.

        Events that come in one chunk share the time since the one before. With several choices
        their events alternate, so the time is that between any two of them.
        """
        return self._gaps

    @property
    def duration_seconds(self) -> float | None:
        """From the request's arrival to the answer's end; None before that."""
        return None if self._ended is None else self._ended - self._started

    def head(self, status: int, content_type: str) -> None:
        """Note that the answer begins.

        Args:
            status: Its HTTP status.
            content_type: As in its header, with or without parameters.
        """
        self.status = status
        self._is_stream = content_type.lstrip()[:17].lower() == "text/event-stream"

    def chunk(self, data: bytes) -> None:
        """Note the next bytes.

        Args:
            data: What goes to the client, cut anywhere; whole events cost least.
        """
        now = self._clock()
        if not self._is_flowing or data[-2:] != b"\n\n":
            self._read_slowly(data, now)
            return
        if (
            data.count(b"\n") == self._event_lines
            and data.endswith(self._event_end)
            and not data.startswith(UNUSUAL)
            and len(data) <= KEPT_BYTES
        ):
            events = 1 if not self._is_named or data.find(b"delta\n", 0, NAME_BYTES) > 0 else 0
            self._before_last, self._last = self._last, data
        else:
            events = self._read_events(data)
        if events:
            self._add_gap((now - self._last_token) / events, events)
            self._last_token = now

    def finish(self, outcome: Outcome) -> None:
        """Note the end, and read how many tokens there were. Only the first call counts.

        Args:
            outcome: How it ended.
        """
        if self.outcome is not None:
            return
        self.outcome = outcome
        self._ended = self._clock()
        if self._is_stream:
            if self._begun.strip():
                self._read_events(self._begun.replace(b"\r", b"\n"))
            last = self._before_last + self._last
            self._look_for_error(last)
        else:
            last = self._body
        for text in (self._earlier_usage, last):
            # A plain search finds out what the expression's would take much longer for.
            if b'"usage"' in text:
                for usage in _usages(text):
                    self._read_usage(usage)
        self._begun = self._earlier_usage = self._last = self._before_last = self._body = b""

    def _add_gap(self, seconds: float, events: int) -> None:
        if self._gaps is None:
            self._gaps = Latencies(INTER_TOKEN_BUCKETS)
        self._gaps.add(seconds, events)

    def _read_slowly(self, data: bytes, now: float) -> None:
        """Read what comes before the first token, events cut anywhere, and bodies."""
        if self._first_byte is None and data:
            self._first_byte = now
        if not self._is_stream:
            self._read_body(data)
            return
        if events := self._whole_events(data):
            self._read_whole(events, now)
        self._is_flowing = self._first_token is not None and not self._begun

    def _read_whole(self, events: bytes, now: float) -> None:
        """Read events of which the first token may be one."""
        count = self._read_events(events)
        if self._first_token is None:
            if self._is_generated(events):
                self._begin_flow(events)
                self._first_token = self._last_token = now
            if not self._earlier_usage:
                self._note_usage(events)
        elif count:
            self._add_gap((now - self._last_token) / count, count)
            self._last_token = now

    def _begin_flow(self, events: bytes) -> None:
        """Learn what an ordinary event looks like."""
        self._event_lines = 3 if self._is_named else 2
        # A chat's event with nothing but `usage` ends otherwise.
        self._event_end = b"}\n\n" if self._is_named else events[-4:]

    def _read_events(self, events: bytes) -> int:
        """Read events of any kind, and say how many of them are generated."""
        self._before_last, self._last = self._last, events[-KEPT_BYTES:]
        self._look_for_error(events)
        return self._count(events)

    def _look_for_error(self, events: bytes) -> None:
        # Two plain searches cost a fraction of the expression's, which hardly ever is needed.
        if b"error" in events or b"response.failed" in events:
            self._has_error_event = self._has_error_event or bool(ERROR_LINE.search(events))

    def _whole_events(self, data: bytes) -> bytes:
        """The events that are complete with these bytes, their line ends made one kind."""
        text = self._begun + data
        # It may be the first half of a CR LF.
        is_half = text.endswith(b"\r")
        text = text.removesuffix(b"\r").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        end = text.rfind(b"\n\n") + 2
        if end == 1:
            end = 0
        self._begun = text[end:][-KEPT_BYTES:] + (b"\r" if is_half else b"")
        return text[:end]

    def _count(self, events: bytes) -> int:
        """How many generated events there are, in a stream that has had one."""
        if self._is_named:
            # content_block_delta of messages, *.delta of responses; but message_delta is none.
            return events.count(b".delta\n") + events.count(b"_block_delta\n")
        count = events.count(b"\ndata:") + events.startswith(b"data:") - events.endswith(DONE)
        if b'"usage"' in events and NO_CHOICES.search(events):
            count -= 1  # the usage alone
        return count

    def _is_generated(self, events: bytes) -> bool:
        """Whether any event holds something that the model made."""
        if b"data:" not in events:
            return False  # comments, as some engines send to keep a connection open
        if self._is_named is None:
            self._is_named = events.startswith(b"event:") or b"\nevent:" in events
        if self._is_named:
            return self._count(events) > 0
        return any(_holds_text(event) for event in events.split(b"\n\n"))

    def _note_usage(self, text: bytes) -> None:
        """Keep where `usage` stands, for the end."""
        if found := USAGE.search(text):
            self._earlier_usage = text[found.start() :][:KEPT_BYTES]

    def _read_body(self, data: bytes) -> None:
        """Keep the end of a body, and of what goes `usage`: long lists may stand behind it."""
        self._body += data
        if len(self._body) > KEPT_BYTES:
            # One that was cut here is in what is kept, and found once more.
            self._note_usage(self._body[max(0, self._body.rfind(b'"usage"')) :])
            self._body = self._body[-OVERLAP_BYTES:]

    def _read_usage(self, usage: Mapping[str, object]) -> None:
        """Take the counts that are there; later ones replace earlier ones."""
        prompt = _tokens(usage, "prompt_tokens")
        if prompt is None and (prompt := _tokens(usage, "input_tokens")) is not None:
            # Anthropic counts these apart.
            for cached in ("cache_read_input_tokens", "cache_creation_input_tokens"):
                prompt += _tokens(usage, cached) or 0
        completion = _tokens(usage, "completion_tokens")
        if completion is None:
            completion = _tokens(usage, "output_tokens")
        self.prompt_tokens = self.prompt_tokens if prompt is None else prompt
        self.completion_tokens = self.completion_tokens if completion is None else completion


def _holds_text(event: bytes) -> bool:
    """Whether an event without a name holds something that the model made."""
    event = event.lstrip(b"\n")
    if not event.startswith(b"data:") or event[5:].strip() == b"[DONE]":
        return False
    if ERROR_LINE.search(event) or NO_CHOICES.search(event):
        return False
    return TEXT.search(event) is not None or ROLE.search(event) is None


def _usages(text: bytes) -> Iterator[Mapping[str, object]]:
    """The objects that stand behind `"usage":`."""
    for found in USAGE.finditer(text):
        place = text[found.end() : found.end() + OVERLAP_BYTES].decode(errors="replace")
        try:
            value, _ = DECODER.raw_decode(place)
        except (ValueError, RecursionError):
            continue  # cut off, or not JSON: unknown
        yield value


def _tokens(usage: Mapping[str, object], name: str) -> int | None:
    count = usage.get(name)
    if not isinstance(count, int) or isinstance(count, bool):
        return None
    return count if 0 <= count < MAX_TOKENS else None
