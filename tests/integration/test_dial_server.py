"""A dial without our router: vLLM's own server, with two vectors, as our flags make it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from tests.integration.conftest import DEMO
from tests.integration.test_native import ENGINE_ENV, SERVER_KEY, end, is_ready
from tests.support.processes import until
from vllm_rvec.loader.dial.parts import ADMISSION, ENVIRONMENT, MIDDLEWARE, SCHEDULER, WORKER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.processes import RunningServer

pytestmark = pytest.mark.engine

QUESTION = "Mia has 74 apples. Gives 6. Gets 2. Gets 1. How many apples now?"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
LONG = " ".join(f"Start with {n}. Add 5. Take 8. What is the result?" for n in range(40, 52))
"""More than a block of the prefix cache."""
GUIDED = {"backend": "xgrammar", "disable_any_whitespace": True}
HALVES = {"reasoning": 0.5, "again": 0.5}
"""The same vector twice: together alpha 1."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = str(DEMO / "vector")
    extra = {
        "mode": "dial",
        "vectors": [{"path": path, "name": "reasoning"}, {"path": path, "name": "again"}],
        "variants": {"plain": 0, "halves": HALVES},
        "alpha_range": [0, 1],
    }
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(DEMO / "target"), "--load-format", "rvec"),
        *("--model-loader-extra-config", json.dumps(extra), "--dtype", "float32"),
        *("--enforce-eager", "--max-model-len", "256", "--host", "127.0.0.1", "--port", str(port)),
        *("--served-model-name", "engine", "--api-key", SERVER_KEY),
        *("--worker-cls", WORKER, "--scheduler-cls", SCHEDULER),
        *("--logits-processors", ADMISSION, "--middleware", MIDDLEWARE),
        "--enable-prompt-tokens-details",
        # So small a model would fill its JSON up with spaces.
        *("--structured-outputs-config", json.dumps(GUIDED)),
    ]
    log = tmp_path_factory.mktemp("dial-server") / "log"
    with log.open("w") as output:
        env = ENGINE_ENV | ENVIRONMENT
        process = subprocess.Popen(command, stdout=output, stderr=output, env=env)
    try:
        until(lambda: is_ready(process, port, log), "vLLM's own server is ready", 240)
        assert "Any alpha in 0:1" in log.read_text()
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        end(process)


@pytest.fixture
def asker(server: str) -> openai.OpenAI:
    """The real client."""
    return openai.OpenAI(base_url=server, api_key=SERVER_KEY, max_retries=0)


def chat(client: openai.OpenAI, model: str, **options: Any) -> tuple[str, str, str]:
    """What was answered, by whom, and at which alpha."""
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=MESSAGES, temperature=0, max_tokens=60, **options
    )
    reply: Any = raw.parse()
    return reply.choices[0].message.content, reply.model, raw.headers["x-rvec-alpha"]


@pytest.fixture(scope="module")
def expected(server: str, fused_demo: RunningServer) -> dict[str, str]:
    """What engines that were fused at 0 and 1 say."""
    del server
    found = {}
    for name in fused_demo.models:
        reply = fused_demo.client().chat.completions.create(
            model=name, messages=MESSAGES, temperature=0, max_tokens=60
        )
        found[name] = str(reply.choices[0].message.content)
    assert found["base"] != found["enhanced@1"]
    return found


WAYS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a variant": ("halves", {}, "0.5"),
    "a name": ("enhanced@0.5", {}, "0.5"),
    "a number in the body": ("plain", {"extra_body": {"alpha": 0.5}}, "0.5"),
    "a mapping in the body": ("plain", {"extra_body": {"alpha": {"again": 1}}}, ""),
    "vLLM's own field": ("plain", {"extra_body": {"vllm_xargs": {"alpha": [0.25, 0.75]}}}, ""),
    "a header": ("plain", {"extra_headers": {"X-Rvec-Alpha": "0.5"}}, "0.5"),
    "names in a header": ("engine", {"extra_headers": {"X-Rvec-Alpha": "reasoning=1"}}, ""),
    "the body goes first": (
        "plain",
        {"extra_body": {"alpha": 0.5}, "extra_headers": {"X-Rvec-Alpha": "0"}},
        "0.5",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_alpha_can_be_said_in_several_ways(
    asker: openai.OpenAI, expected: dict[str, str], way: str
) -> None:
    """Two vectors at 0.5, or one at 1, answer as the engine that was fused at 1.

    The answer says who was asked, and what was used.
    """
    name, options, alpha = WAYS[way]
    text, model, used = chat(asker, name, **options)
    assert text == expected["enhanced@1"]
    assert model == name
    assert used == alpha or (not alpha and "=" in used)


def test_alpha_zero_is_the_target(asker: openai.OpenAI, expected: dict[str, str]) -> None:
    """By name; and a variant of two vectors is the same for all."""
    assert chat(asker, "plain") == (expected["base"], "plain", "0")
    assert chat(asker, "enhanced@0")[0] == expected["base"]


def test_every_endpoint_understands_names(
    asker: openai.OpenAI, server: str, expected: dict[str, str]
) -> None:
    """Streams, completions, responses, and Anthropic's messages."""
    chunks = list(
        asker.chat.completions.create(
            model="halves", messages=MESSAGES, temperature=0, max_tokens=60, stream=True
        )
    )
    assert {chunk.model for chunk in chunks} == {"halves"}
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == expected["enhanced@1"]
    done = asker.completions.create(
        model="halves", prompt="Start with 46. Add 5.", temperature=0, max_tokens=8
    )
    other = asker.completions.create(
        model="plain", prompt="Start with 46. Add 5.", temperature=0, max_tokens=8
    )
    assert (done.model, other.model) == ("halves", "plain")
    assert done.choices[0].text != other.choices[0].text
    response = asker.responses.create(
        model="halves", input=QUESTION, temperature=0, max_output_tokens=60
    )
    assert (response.model, response.output_text) == ("halves", expected["enhanced@1"])
    body = {"model": "halves", "messages": MESSAGES, "max_tokens": 60, "temperature": 0}
    message = httpx.post(
        f"{server}/messages",
        json=body,
        headers={"Authorization": f"Bearer {SERVER_KEY}"},
        timeout=60,
    )
    assert message.json()["model"] == "halves"
    assert message.json()["content"][0]["text"] == expected["enhanced@1"]
    assert message.headers["x-rvec-alpha"] == "0.5"


def test_every_endpoint_streams_the_variants_answer(
    asker: openai.OpenAI, server: str, expected: dict[str, str]
) -> None:
    """Completions, responses and messages; each event that names a model names the variant."""
    whole = asker.completions.create(
        model="halves", prompt="Start with 46. Add 5.", temperature=0, max_tokens=8
    )
    pieces = list(
        asker.completions.create(
            model="halves", prompt="Start with 46. Add 5.", temperature=0, max_tokens=8, stream=True
        )
    )
    assert "".join(p.choices[0].text for p in pieces if p.choices) == whole.choices[0].text
    assert {piece.model for piece in pieces} == {"halves"}
    events = list(
        asker.responses.create(
            model="halves", input=QUESTION, temperature=0, max_output_tokens=60, stream=True
        )
    )
    said = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert said == expected["enhanced@1"]
    assert {e.response.model for e in events if e.type == "response.completed"} == {"halves"}
    body = {"model": "halves", "messages": MESSAGES, "max_tokens": 60, "temperature": 0}
    headers = {"Authorization": f"Bearer {SERVER_KEY}"}
    with httpx.stream(
        "POST", f"{server}/messages", json=body | {"stream": True}, headers=headers, timeout=60
    ) as reply:
        assert reply.headers["x-rvec-alpha"] == "0.5"
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if "{" in line]
    found = [json.loads(line) for line in lines]
    assert found[0]["message"]["model"] == "halves"
    deltas = [e["delta"].get("text", "") for e in found if e["type"] == "content_block_delta"]
    assert "".join(deltas) == expected["enhanced@1"]


def test_structured_output_is_the_variants_own(asker: openai.OpenAI) -> None:
    """Guided decoding masks the logits of the sum."""
    schema = {"type": "object", "properties": {"n": {"enum": [7, 43, 55]}}, "required": ["n"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for name in ("plain", "halves"):
        reply = asker.chat.completions.create(
            model=name, messages=MESSAGES, temperature=0, max_tokens=40, response_format=form
        )
        assert json.loads(str(reply.choices[0].message.content))["n"] in {7, 43, 55}


def test_variants_are_listed(asker: openai.OpenAI) -> None:
    """In the place of the one name that vLLM has; with what they are."""
    cards = {card.id: card.to_dict() for card in asker.models.list()}
    assert list(cards) == ["plain", "halves"]
    assert cards["halves"]["rvec"] == {
        "alpha": 0.5,
        "vectors": ["reasoning", "again"],
        "alpha_range": [0.0, 1.0],
    }
    assert cards["plain"]["max_model_len"] == 256


@pytest.mark.parametrize(
    ("model", "options", "status", "says"),
    [
        ("enhanced@1.5", {}, 404, "0:1"),
        ("nobody", {}, 404, "halves"),
        ("plain", {"extra_body": {"alpha": 2}}, 400, "outside of 0:1"),
        ("plain", {"extra_body": {"alpha": {"style": 1}}}, 400, "reasoning, again"),
        ("plain", {"extra_body": {"alpha": [1, 1, 1]}}, 400, "3 numbers"),
        ("plain", {"extra_body": {"vllm_xargs": {"alpha": "NaN"}}}, 400, "number"),
        ("plain", {"extra_headers": {"X-Rvec-Alpha": "much"}}, 400, "number"),
    ],
)
def test_what_cant_be_is_refused(
    asker: openai.OpenAI, model: str, options: dict[str, Any], status: int, says: str
) -> None:
    """In OpenAI's form, with what there is; and the engine goes on."""
    with pytest.raises(openai.APIStatusError) as caught:
        chat(asker, model, **options)
    assert caught.value.status_code == status
    assert says in str(caught.value.body)
    assert chat(asker, "plain")[2] == "0"


def test_without_the_key_nothing_is_read_or_told(server: str) -> None:
    """VLLM's check of the key comes first, though it is inside of ours."""
    body = {"model": "nobody", "messages": MESSAGES, "alpha": 99}
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        reply = httpx.post(f"{server}/chat/completions", json=body, headers=headers)
        assert reply.status_code == 401
        assert "halves" not in reply.text
        assert httpx.get(f"{server}/models", headers=headers).status_code == 401


def test_a_shared_prompt_is_cached_for_each_alpha(asker: openai.OpenAI) -> None:
    """No hit across, hits within; also for who brings the salt of another alpha."""

    def cached(model: str, **extra: Any) -> int:
        done = asker.completions.create(
            model=model, prompt=LONG, max_tokens=1, temperature=0, extra_body=extra
        )
        assert done.usage is not None
        assert done.usage.prompt_tokens_details is not None
        return done.usage.prompt_tokens_details.cached_tokens or 0

    names = ["plain", "halves", "enhanced@1"]
    assert [cached(name) for name in names] == [0, 0, 0]
    assert all(cached(name) >= 128 for name in names)
    assert cached("enhanced@0.5") >= 128  # what `halves` is
    assert cached("plain", cache_salt="rvec 1 1") == 0
