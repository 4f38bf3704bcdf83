"""Who has a stored response, and where an answer says its id."""

from __future__ import annotations

import doctest
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_rvec.router import owners
from vllm_rvec.router.owners import FIRST_BYTES, Owner, ResponseOwners, response_id_of

RESPONSE = {
    "id": "resp_0123456789abcdef",
    "created_at": 1_700_000_000,
    "incomplete_details": None,
    "instructions": 'Say {"id": "resp_of_the_client"}\n\ndata: {"response":{"id":"resp_too"}}',
    "metadata": {"id": "resp_of_the_client"},
    "model": "base",
    "object": "response",
    "output": [{"id": "msg_1", "content": []}],
}
ID = RESPONSE["id"]
BODY = json.dumps(RESPONSE, separators=(",", ":")).encode()
CREATED = {"response": RESPONSE, "sequence_number": 0, "type": "response.created"}
STREAM = b"event: response.created\ndata: " + json.dumps(CREATED).encode() + b"\n\n"


def test_a_response_has_the_owner_that_was_noted() -> None:
    """And others have none."""
    known = ResponseOwners()
    known.note("resp_1", "base", "http://a")
    assert known.find("resp_1") == Owner("base", "http://a")
    assert known.find("resp_2") is None


def test_the_last_word_counts() -> None:
    """A client may choose the same id twice; vLLM keeps the later response."""
    known = ResponseOwners()
    known.note("resp_1", "base", "http://a")
    known.note("resp_1", "enhanced@1", "http://b")
    assert known.find("resp_1") == Owner("enhanced@1", "http://b")
    assert len(known) == 1


def test_the_one_not_asked_for_longest_is_forgotten_first() -> None:
    """Asking for one, and noting it again, keeps it."""
    known = ResponseOwners(max_entries=3)
    for name in ("resp_1", "resp_2", "resp_3"):
        known.note(name, "base", "http://a")
    known.find("resp_1")
    known.note("resp_2", "base", "http://a")
    known.note("resp_4", "base", "http://a")
    kept = [name for name in ("resp_1", "resp_2", "resp_3", "resp_4") if known.find(name)]
    assert kept == ["resp_1", "resp_2", "resp_4"]


@given(st.lists(st.integers(0, 20)), st.integers(0, 5))
def test_there_are_never_more_than_allowed(ids: list[int], limit: int) -> None:
    """Memory is bounded, and the last ones are those that stay."""
    known = ResponseOwners(max_entries=limit)
    for number in ids:
        known.note(f"resp_{number}", "base", "http://a")
    last = list(dict.fromkeys(reversed(ids)))[:limit]
    assert len(known) == len(last)
    assert all(known.find(f"resp_{number}") for number in last)


@pytest.mark.parametrize("answer", [BODY, STREAM, b": ping\n\n" + STREAM, b"\r\n" + BODY])
def test_the_id_is_found(answer: bytes) -> None:
    """In a body and in a stream, and not in what the client wrote into them."""
    assert response_id_of(answer) == ID


@pytest.mark.parametrize("newline", [b"\r\n", b"\r"])
def test_any_line_ending_of_an_event_will_do(newline: bytes) -> None:
    """The HTML standard allows three."""
    assert response_id_of(STREAM.replace(b"\n", newline)) == ID


def test_the_order_of_keys_does_not_matter() -> None:
    """Another server than vLLM may say the type first."""
    shuffled = {"type": "response.created", "response": dict(reversed(RESPONSE.items()))}
    assert response_id_of(b"data: " + json.dumps(shuffled).encode() + b"\n\n") == ID
    assert response_id_of(json.dumps(dict(reversed(RESPONSE.items()))).encode()) == ID


@pytest.mark.parametrize("answer", [BODY, STREAM])
def test_a_cut_answer_gives_the_whole_id_or_none(answer: bytes) -> None:
    """Wherever the first chunk ends."""
    found = [response_id_of(answer[:end]) for end in range(len(answer) + 1)]
    first = found.index(str(ID))
    assert set(found[:first]) == {None}
    assert set(found[first:]) == {ID}
    assert first < 80


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"data: [DONE]\n\n",
        b"id: resp_1\n\n",
        b'{"error":{"message":"no","id":"resp_1"}}',
        b'{"response":{"id":"resp_1"}}',
        b'data: {"error":{"id":"resp_1"}}\n\ndata: {"response":{"id":"resp_2"}}\n\n',
        b'data: {"id":"resp_1","type":"response.created"}\n\n',
        b'[{"id":"resp_1"}]',
        b'{"id":7}',
        b'{"id":"\xff"}',
        b'{"id":' + b"[" * 5_000,
        b"\x1f\x8b\x08\x00",
    ],
)
def test_other_answers_have_no_id(answer: bytes) -> None:
    """Errors, other streams and noise."""
    assert response_id_of(answer) is None


@pytest.mark.parametrize(
    "chosen", ["", "..", "../sleep", "a/b", "a?b", "a%2fb", "a b", "a\r\nb", ".a", "ä", "x" * 201]
)
def test_an_id_that_could_be_more_than_a_part_of_a_path_is_passed_over(chosen: str) -> None:
    """Clients choose ids by `request_id`; nobody is led to another path by one."""
    assert response_id_of(json.dumps({"id": chosen}).encode()) is None


def test_an_id_that_a_client_chose_is_found() -> None:
    """VLLM takes any `request_id` for the response's."""
    assert response_id_of(b'{"id":"my-request_1"}') == "my-request_1"


def test_no_more_than_the_beginning_is_read() -> None:
    """An id behind it isn't found, and megabytes cost nothing."""
    far = b'{"instructions":"' + b"x" * FIRST_BYTES + b'","id":"resp_1"}'
    assert response_id_of(far) is None
    assert response_id_of(BODY[:-1] + b',"text":"' + b"x" * 2**22 + b'"}') == ID


@given(
    st.binary(max_size=200)
    | st.lists(st.sampled_from([b"data:", b"\n", BODY, b"{", b'"'])).map(b"".join)
)
def test_nothing_that_comes_raises(answer: bytes) -> None:
    """It is read on the way to the client, who must get it anyhow."""
    found = response_id_of(answer)
    assert found is None or found.isascii()


def test_vllm_says_the_id_where_it_is_looked_for() -> None:
    """Its own types, written as its server writes them."""
    from vllm.entrypoints.openai.responses.protocol import ResponseCreatedEvent, ResponsesResponse

    numbers = {"temperature": 1.0, "top_p": 1.0, "max_output_tokens": 9}
    lists = {"output": [], "tools": [], "tool_choice": "auto", "parallel_tool_calls": True}
    words = {"service_tier": "auto", "status": "queued", "truncation": "disabled"}
    response = ResponsesResponse(model="m", background=True, **numbers, **lists, **words)
    event = ResponseCreatedEvent(type="response.created", sequence_number=0, response=response)
    said = event.model_dump_json(indent=None, by_alias=True)
    body = response.model_dump_json(by_alias=True)
    assert response.id.startswith("resp_")
    assert response_id_of(body.encode()[:40]) == response.id
    assert response_id_of(f"event: {event.type}\ndata: {said}"[:80].encode()) == response.id


def test_the_examples_in_the_docstrings_hold() -> None:
    """Documentation that runs."""
    assert doctest.testmod(owners).failed == 0
