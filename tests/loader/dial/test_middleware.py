"""What becomes of requests and answers on their way, before a server that says what it got.

The server is a stand-in: a real one does not say what it was given, nor sends odd parts.
`tests/integration/test_dial_server.py` has the real one.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from vllm_rvec.loader.dial.middleware import DialMiddleware

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

EXTRA = {
    "mode": "dial",
    "vectors": [{"path": "a", "name": "reasoning"}, {"path": "b", "name": "style"}],
    "variants": {"base": 0, "mixed": {"reasoning": 0.7, "style": -0.2}},
    "alpha": 0.25,
}


async def echo(request: Request) -> Response:
    """Say what came, and call the model by vLLM's name."""
    body = json.loads(await request.body() or b"{}")
    said = json.dumps(body)  # as text, which is left as it is
    return JSONResponse({"got": said, "model": "served", "text": 'x"model":"served"'})


async def stream(request: Request) -> Response:
    """Events as vLLM sends them, the model's name in each."""
    await request.body()

    async def events() -> AsyncIterator[bytes]:
        for number in range(3):
            yield f'data: {{"model":"served","n":{number}}}\n\n'.encode()

    return StreamingResponse(events(), media_type="text/event-stream")


async def guarded(_: Request) -> Response:
    """As vLLM's check of the key: it answers without reading the body."""
    return JSONResponse({"error": "Unauthorized"}, status_code=401)


async def models(_: Request) -> Response:
    return JSONResponse({"object": "list", "data": [{"id": "served", "max_model_len": 9}]})


@pytest.fixture
def client() -> TestClient:
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", echo, methods=["POST"]),
            Route("/v1/completions", stream, methods=["POST"]),
            Route("/v1/responses", guarded, methods=["POST"]),
            Route("/tokenize", echo, methods=["POST"]),
            Route("/v1/embeddings", echo, methods=["POST"]),
            Route("/v1/models", models),
        ]
    )
    app.add_middleware(DialMiddleware)
    loads = SimpleNamespace(model_loader_extra_config=EXTRA)
    config = SimpleNamespace(load_config=loads)
    app.state.engine_client = SimpleNamespace(vllm_config=config)
    app.state.openai_serving_models = SimpleNamespace(model_name=lambda: "served")
    return TestClient(app)


def ask(client: TestClient, body: Any, path: str = "/v1/chat/completions", **headers: str) -> Any:
    return client.post(path, json=body, headers=headers)


@pytest.mark.parametrize(
    ("body", "headers", "alphas"),
    [
        ({"model": "base"}, {}, [0, 0]),
        ({"model": "mixed"}, {}, [0.7, -0.2]),
        ({"model": "enhanced@0.5"}, {}, [0.5, 0.5]),
        ({}, {}, [0.25, 0.25]),
        ({"model": "served"}, {}, [0.25, 0.25]),
        ({"model": "base", "alpha": {"style": 1}}, {}, [0, 1]),
        ({"model": "base", "alpha": None}, {}, [0, 0]),
        ({"model": "base"}, {"x-rvec-alpha": "style=0.5"}, [0, 0.5]),
        ({"model": "base", "alpha": 1}, {"x-rvec-alpha": "2"}, [1, 1]),
        ({"model": "base", "vllm_xargs": {"alpha": [1, 0], "other": "kept"}}, {}, [1, 0]),
    ],
)
def test_alphas_become_what_vllm_knows(
    client: TestClient, body: dict[str, Any], headers: dict[str, str], alphas: list[float]
) -> None:
    """A list in the vectors' order, in `vllm_xargs`; the rest of the body stays."""
    reply = ask(client, {"n": 1, **body}, **headers)
    got = json.loads(reply.json()["got"])
    assert got["model"] == "served"
    assert got["vllm_xargs"]["alpha"] == alphas
    assert got["n"] == 1
    assert "alpha" not in got
    if "vllm_xargs" in body:
        assert got["vllm_xargs"]["other"] == "kept"
    assert "x-rvec-alpha" in reply.headers


def test_the_answer_calls_the_model_as_it_was_asked(client: TestClient) -> None:
    """In its own field only: what the model wrote has a backslash before each quote."""
    reply = ask(client, {"model": "mixed"})
    assert reply.json()["model"] == "mixed"
    assert reply.json()["text"] == 'x"model":"served"'
    assert reply.headers["x-rvec-alpha"] == "reasoning=0.7, style=-0.2"
    assert int(reply.headers["content-length"]) == len(reply.content)


def test_every_event_of_a_stream_does(client: TestClient) -> None:
    """As they come."""
    reply = ask(client, {"model": "enhanced@1"}, "/v1/completions")
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line]
    assert [event["model"] for event in events] == ["enhanced@1"] * 3
    assert reply.headers["x-rvec-alpha"] == "1"


def test_tokenizing_needs_a_name_only(client: TestClient) -> None:
    """No weights, no alpha."""
    reply = ask(client, {"model": "mixed", "prompt": "x"}, "/tokenize")
    assert json.loads(reply.json()["got"]) == {"model": "served", "prompt": "x"}


def test_other_paths_are_left_alone(client: TestClient) -> None:
    """They have no alpha to say."""
    body = {"model": "whatever", "alpha": 5}
    assert json.loads(ask(client, body, "/v1/embeddings").json()["got"]) == body


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "enhanced@3"}, 404, "model_not_found"),
        ({"model": "x" * 5000}, 404, "model_not_found"),
        ({"model": 7}, 404, "model_not_found"),
        ({"model": "base", "alpha": 10**400}, 400, "invalid_alpha"),
        ({"model": "base", "alpha": True}, 400, "invalid_alpha"),
        ({"model": "base", "use_beam_search": True}, 400, "unsupported_parameter"),
        ({"model": "base", "alpha": {"who": 1}}, 400, "invalid_alpha"),
        ({"model": "base", "vllm_xargs": {"alpha": "1"}}, 400, "invalid_alpha"),
    ],
)
def test_what_cant_be_is_refused(
    client: TestClient, body: dict[str, Any], status: int, code: str
) -> None:
    """In OpenAI's form, and briefly."""
    reply = ask(client, body)
    assert reply.status_code == status
    assert reply.json()["error"]["code"] == code
    assert len(reply.text) < 600


def test_who_may_not_ask_is_told_nothing_else(client: TestClient) -> None:
    """What is inside answers before anything is read here."""
    reply = ask(client, {"model": "nobody", "alpha": 99}, "/v1/responses")
    assert reply.status_code == 401
    assert reply.json() == {"error": "Unauthorized"}


@pytest.mark.parametrize("body", [b"[1]", b'"text"', b""])
def test_what_is_no_object_is_vllms_to_refuse(client: TestClient, body: bytes) -> None:
    """It gets there as it came."""
    reply = client.post("/v1/chat/completions", content=body)
    assert json.loads(reply.json()["got"]) == json.loads(body or b"{}")


def test_variants_stand_in_the_place_of_vllms_name(client: TestClient) -> None:
    """With the facts of each, and all else that vLLM says."""
    cards = client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["base", "mixed"]
    assert cards[1]["rvec"]["alpha"] == {"reasoning": 0.7, "style": -0.2}
    assert cards[0]["rvec"]["alpha"] == 0
    assert all(card["max_model_len"] == 9 for card in cards)
