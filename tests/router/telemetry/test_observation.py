"""What is measured of an answer while its bytes pass."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.router.conftest import chat_event
from vllm_rvec.router.telemetry import Observation, Outcome
from vllm_rvec.router.telemetry.observation import KEPT_BYTES

STREAM = "text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 7, "total_tokens": 10, "completion_tokens": 3}


class Clock:
    """Goes on when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """What a test has set."""
        return self.now


def compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def event(value: object, name: str = "") -> bytes:
    """An event as vLLM writes it."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + compact(value) + b"\n\n"


def delta(**fields: Any) -> bytes:
    choice = {"index": 0, "delta": fields, "logprobs": None, "finish_reason": None}
    return event({"id": "1", "object": "chat.completion.chunk", "choices": [choice]})


ROLE = delta(role="assistant", content="")
CHAT_USAGE = event({"id": "1", "choices": [], "usage": USAGE})

CHAT = [ROLE, delta(content="a"), delta(content="b"), delta(content="c"), CHAT_USAGE, DONE]

MESSAGES = [
    event({"type": "message_start", "message": {"usage": {"input_tokens": 7}}}, "message_start"),
    event({"type": "content_block_start", "index": 0}, "content_block_start"),
    event({"type": "content_block_delta", "delta": {"text": "a"}}, "content_block_delta"),
    event({"type": "content_block_delta", "delta": {"text": "b"}}, "content_block_delta"),
    event({"type": "content_block_delta", "delta": {"text": "c"}}, "content_block_delta"),
    event({"type": "content_block_stop", "index": 0}, "content_block_stop"),
    event({"type": "message_delta", "usage": {"output_tokens": 3}}, "message_delta"),
    event({"type": "message_stop"}, "message_stop"),
]

RESPONSES = [
    event({"type": "response.created", "response": {"usage": None}}, "response.created"),
    event({"type": "response.output_item.added"}, "response.output_item.added"),
    event({"type": "response.output_text.delta", "delta": "a"}, "response.output_text.delta"),
    event({"type": "response.output_text.delta", "delta": "b"}, "response.output_text.delta"),
    event({"type": "response.output_text.delta", "delta": "c"}, "response.output_text.delta"),
    event({"type": "response.output_text.done", "text": "abc"}, "response.output_text.done"),
    event(
        {
            "type": "response.completed",
            "response": {
                "error": None,
                "output": ["abc"],
                "usage": {"input_tokens": 7, "output_tokens": 3},
                "user": None,
            },
        },
        "response.completed",
    ),
]

STREAMS = {"chat": CHAT, "messages": MESSAGES, "responses": RESPONSES}


def watch(
    chunks: list[bytes],
    *,
    content_type: str = STREAM,
    status: int = 200,
    outcome: Outcome = Outcome.COMPLETE,
) -> Observation:
    """Let chunks pass, one a second."""
    clock = Clock()
    seen = Observation(clock)
    seen.head(status, content_type)
    for chunk in chunks:
        clock.now += 1
        seen.chunk(chunk)
    seen.finish(outcome)
    return seen


@pytest.mark.parametrize("name", STREAMS)
def test_tokens_are_read_from_the_usage_of_a_stream(name: str) -> None:
    """In each of the shapes that vLLM has."""
    seen = watch(STREAMS[name])
    assert (seen.prompt_tokens, seen.completion_tokens) == (7, 3)


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
@given(places=st.lists(st.integers(0, 2000), max_size=20))
def test_what_is_read_does_not_depend_on_where_chunks_are_cut(
    name: str, line_end: bytes, places: list[int]
) -> None:
    """Tokens and errors are those of the events, whatever the network makes of them."""
    text = b"".join(STREAMS[name]).replace(b"\n", line_end)
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    seen = watch([text[start:end] for start, end in itertools.pairwise(edges)])
    assert (seen.prompt_tokens, seen.completion_tokens) == (7, 3)
    assert not seen.has_error
    assert seen.ttft_seconds is not None


@pytest.mark.parametrize("name", STREAMS)
def test_time_to_first_token_is_that_of_the_first_generated_event(name: str) -> None:
    """A role, or the begin of a block, is no token."""
    first = {"chat": 2, "messages": 3, "responses": 3}[name]
    assert watch(STREAMS[name]).ttft_seconds == first


@pytest.mark.parametrize("name", STREAMS)
def test_only_generated_events_have_a_latency(name: str) -> None:
    """Three tokens have two gaps; usage, ends of blocks and [DONE] have none."""
    latencies = watch(STREAMS[name]).inter_token_latencies
    assert latencies is not None
    assert (latencies.count, latencies.total_seconds) == (2, 2.0)


def test_events_in_one_chunk_share_the_time_since_the_one_before() -> None:
    """Four tokens after a second were a quarter of a second each."""
    seen = watch([delta(content="a"), delta(content="b") * 4])
    assert seen.inter_token_latencies is not None
    assert (seen.inter_token_latencies.count, seen.inter_token_latencies.total_seconds) == (4, 1.0)


def test_a_first_event_with_role_and_text_is_a_token() -> None:
    """As other engines than vLLM send it."""
    assert watch([delta(role="assistant", content="a"), DONE]).ttft_seconds == 1


def test_a_stream_with_nothing_but_a_role_counts_from_its_first_byte() -> None:
    """There is no better time, and the client got an answer."""
    assert watch([ROLE, DONE]).ttft_seconds == 1


def test_a_first_tool_call_is_a_token() -> None:
    """It was generated."""
    call = delta(role="assistant", tool_calls=[{"index": 0}])
    assert watch([ROLE, call, delta(content="x")]).ttft_seconds == 2


def test_comments_are_no_tokens() -> None:
    """Some engines send them to keep a connection open."""
    ping = b": ping\n\n"
    seen = watch([ping, delta(content="a"), ping, delta(content="b"), ping])
    assert seen.ttft_seconds == 2
    assert seen.inter_token_latencies is not None
    assert (seen.inter_token_latencies.count, seen.inter_token_latencies.total_seconds) == (1, 2.0)


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(b'data: {"error": {"message": "m", "code": 500}}\n\n', id="vllm"),
        pytest.param(event({"error": {"message": "m"}}), id="compact"),
        pytest.param(b'data:{ "error" :"m"}\n\n', id="spaces"),
        pytest.param(event({"object": "error", "message": "m"}), id="old vllm"),
        pytest.param(event({"type": "error", "error": {}}, "error"), id="messages"),
        pytest.param(event({"type": "response.failed"}, "response.failed"), id="responses"),
    ],
)
@pytest.mark.parametrize("before", [[], CHAT[:3], MESSAGES[:4]], ids=["first", "chat", "messages"])
@pytest.mark.parametrize("is_joined", [False, True])
def test_an_error_event_inside_a_200_is_an_error(
    error: bytes, before: list[bytes], is_joined: bool
) -> None:
    """However it is written, alone or behind others in one chunk."""
    chunks = [*before, error, DONE]
    seen = watch([b"".join(chunks)] if is_joined else chunks)
    assert seen.has_error_event
    assert seen.has_error


def test_nothing_but_an_error_has_no_time_to_first_token() -> None:
    """A quick failure must not make a variant look fast."""
    assert watch([b'data: {"error": {"message": "m"}}\n\n', DONE]).ttft_seconds is None


@pytest.mark.parametrize(
    "text",
    [
        'data: {"error": {"message": "m"}}',
        '\n\nevent: error\ndata: {"type": "error"}\n\n',
        '"usage": {"prompt_tokens": 1, "completion_tokens": 1}',
        '{"usage":{"prompt_tokens":1,"completion_tokens":1}}',
    ],
)
def test_a_model_that_writes_about_errors_and_usage_causes_none(text: str) -> None:
    """In JSON its quotes and line ends are escaped."""
    seen = watch([ROLE, chat_event(text), chat_event(text), DONE])
    assert not seen.has_error
    assert (seen.prompt_tokens, seen.completion_tokens) == (None, None)


def test_an_error_of_null_is_none() -> None:
    """Responses carry the field always, and some engines' chunks do."""
    assert not watch([b'data: {"error": null, "choices": []}\n\n', *RESPONSES]).has_error


def test_without_usage_tokens_are_unknown() -> None:
    """They are not guessed from events."""
    seen = watch([*CHAT[:4], DONE])
    assert (seen.prompt_tokens, seen.completion_tokens) == (None, None)


def test_usage_in_each_event_counts_up_to_the_last_one_when_the_client_leaves() -> None:
    """With `continuous_usage_stats` tokens are known of an aborted stream too."""
    chunks = [
        event({"choices": [{"delta": {"content": "x"}}], "usage": USAGE | {"completion_tokens": n}})
        for n in range(1, 6)
    ]
    seen = watch(chunks, outcome=Outcome.CLIENT_GONE)
    assert (seen.prompt_tokens, seen.completion_tokens) == (7, 5)
    assert not seen.has_error
    assert seen.inter_token_latencies is not None
    assert seen.inter_token_latencies.count == 4


def test_tokens_from_a_cache_are_tokens_of_the_prompt() -> None:
    """Anthropic counts them apart."""
    usage = {"input_tokens": 2, "cache_read_input_tokens": 5, "output_tokens": 1}
    seen = watch([compact({"usage": usage})], content_type="application/json")
    assert (seen.prompt_tokens, seen.completion_tokens) == (7, 1)


@pytest.mark.parametrize(
    "usage",
    [{"prompt_tokens": -1}, {"prompt_tokens": True}, {"prompt_tokens": 1.5}, {"prompt_tokens": {}}],
)
def test_a_count_that_is_none_is_unknown(usage: dict[str, object]) -> None:
    """A counter must not go back."""
    body = compact({"usage": usage})
    assert watch([body], content_type="application/json").prompt_tokens is None


@pytest.mark.parametrize("tail_bytes", [0, 3 * KEPT_BYTES])
@pytest.mark.parametrize("piece_bytes", [7_001, 65_536, 10**7])
def test_tokens_are_read_from_a_body_however_long(tail_bytes: int, piece_bytes: int) -> None:
    """Also where long lists stand behind `usage`; the time is that of the first byte."""
    tools = {"properties": {"usage": {"type": "object"}}}
    body = {"data": "x" * 200_000, "tools": tools, "usage": USAGE, "prompt": "y" * tail_bytes}
    text = compact(body)
    pieces = [text[at : at + piece_bytes] for at in range(0, len(text), piece_bytes)]
    seen = watch(pieces, content_type="application/json")
    assert (seen.prompt_tokens, seen.completion_tokens) == (7, 3)
    assert (seen.ttft_seconds, seen.is_stream) == (1, False)
    assert seen.duration_seconds == len(pieces)


@pytest.mark.parametrize("data", [delta(content="x" * 1000), b"x" * 1000, b"\r"])
@pytest.mark.parametrize("content_type", [STREAM, "application/json"])
def test_memory_is_bounded_whatever_comes(data: bytes, content_type: str) -> None:
    """Also of a stream without any end of an event."""
    seen = Observation()
    seen.head(200, content_type)
    tracemalloc.start()
    try:
        for _ in range(3_000):
            seen.chunk(data)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 4 * KEPT_BYTES


def test_a_broken_answer_is_an_error_and_a_lost_client_is_none() -> None:
    """The one is the engine's, the other the client's right."""
    assert watch(CHAT[:2], outcome=Outcome.BROKEN).has_error
    assert not watch(CHAT[:2], outcome=Outcome.CLIENT_GONE).has_error


@pytest.mark.parametrize("status", [400, 404, 500, 503])
def test_an_error_status_is_an_error(status: int) -> None:
    """Whatever the body says."""
    assert watch([b"{}"], content_type="application/json", status=status).has_error


def test_only_the_first_end_counts() -> None:
    """A `finally` may call `finish` again."""
    clock = Clock()
    seen = Observation(clock, started=90.0)
    seen.finish(Outcome.BROKEN)
    clock.now += 5
    seen.finish(Outcome.COMPLETE)
    assert (seen.outcome, seen.duration_seconds) == (Outcome.BROKEN, 10.0)
    assert (seen.status, seen.ttft_seconds) == (None, None)


@given(st.lists(st.binary(max_size=50)), st.sampled_from([STREAM, "application/json"]))
def test_junk_is_never_an_exception(chunks: list[bytes], content_type: str) -> None:
    """An answer must pass, whatever is in it: gzip, for one."""
    watch(chunks, content_type=content_type)
    watch([b'{"usage":' + b"".join(chunks), b'{"usage":{' * 50], content_type=content_type)
