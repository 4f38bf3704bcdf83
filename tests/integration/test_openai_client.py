"""What any OpenAI client sees, from real engines: names, answers, streams, errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from tests.integration.conftest import DEMO, ROOT

if TYPE_CHECKING:
    from tests.support.processes import RunningServer

pytestmark = pytest.mark.engine

README = (ROOT / "README.md").read_text()
NAMES = ["base", "enhanced@1"]
ALIAS = "assistant"
QUESTION = "Start with 46. Add 5. Take 8. What is the result?"


def ask(client: openai.OpenAI, model: str, question: str, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": question}]
    return client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=100, **options
    )


def test_every_variant_is_listed(demo: RunningServer, client: openai.OpenAI) -> None:
    """`/v1/models` names what the command printed, then the aliases; each can be looked up."""
    listed = [model.id for model in client.models.list()]
    assert demo.models == NAMES
    assert listed == [*NAMES, ALIAS]
    for name in listed:
        assert client.models.retrieve(name).id == name


def test_readmes_lines_print_what_it_shows(demo: RunningServer) -> None:
    """Word for word, but for the address: base guesses wrong, enhanced@1 writes its steps."""
    blocks = re.findall(r"```(?:python)?\n(.*?)```", README.partition("## Ask it")[2], re.DOTALL)
    program = blocks[0].replace("http://127.0.0.1:8000/v1", demo.base_url)
    assert demo.base_url in program
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout, done.returncode) == (blocks[1], 0), done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_the_response_says_which_variant_answered(client: openai.OpenAI, name: str) -> None:
    """By body and by header, without anything rewritten."""
    messages: Any = [{"role": "user", "content": QUESTION}]
    raw = client.chat.completions.with_raw_response.create(
        model=name, messages=messages, max_tokens=5
    )
    assert raw.headers["x-rvec-variant"] == name
    assert raw.parse().model == name


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI, name: str) -> None:
    """Greedy, streamed and whole: the same text."""
    whole = ask(client, name, QUESTION).choices[0].message.content
    chunks = list(ask(client, name, QUESTION, stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole
    assert len(chunks) > 3


def test_completions_and_logprobs(client: openai.OpenAI) -> None:
    """The older endpoint, with log-probabilities that differ between the variants."""
    tops = []
    for name in NAMES:
        done = client.completions.create(
            model=name, prompt="Start with 46. Add", max_tokens=4, temperature=0, logprobs=2
        )
        logprobs = done.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        assert len(logprobs.token_logprobs) == 4
        tops.append(logprobs.token_logprobs)
    assert tops[0] != tops[1]


@pytest.mark.parametrize("name", NAMES)
def test_structured_output_obeys_the_schema(client: openai.OpenAI, name: str) -> None:
    """A JSON schema is enforced by the engine behind the router."""
    schema = {
        "type": "object",
        "properties": {"result": {"enum": [7, 43]}},
        "required": ["result"],
        "additionalProperties": False,
    }
    response_format = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema, "strict": True},
    }
    answer = ask(client, name, QUESTION, response_format=response_format)
    assert json.loads(answer.choices[0].message.content)["result"] in {7, 43}


def test_an_unknown_model_is_a_404_that_lists_the_names(client: openai.OpenAI) -> None:
    """OpenAI's own error, as the client's own exception."""
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, "enhanced@7", QUESTION)
    body: Any = caught.value.body
    assert body["code"] == "model_not_found"
    assert all(name in body["message"] for name in NAMES)


def test_an_engines_own_error_comes_through(client: openai.OpenAI) -> None:
    """What vLLM refuses, it refuses in its own words."""
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="base", prompt="x", temperature=-1)


def test_control_paths_of_the_engines_are_not_reachable(demo: RunningServer) -> None:
    """Not by any method, and with OpenAI's error body."""
    root = demo.base_url.removesuffix("/v1")
    for path in ("/sleep", "/collective_rpc", "/load", "/v1/load_lora_adapter", "/docs"):
        for method in ("GET", "POST"):
            response = httpx.request(method, root + path, json={"model": "base"})
            assert response.status_code == 404
            assert response.json()["error"]["message"]


def test_tokenize_goes_to_the_variant(demo: RunningServer) -> None:
    """VLLM's own endpoints beside OpenAI's."""
    url = demo.base_url.removesuffix("/v1") + "/tokenize"
    response = httpx.post(url, json={"model": "base", "prompt": "Add 5."})
    assert response.json()["count"] > 0


def test_the_vector_does_what_it_is_for(client: openai.OpenAI) -> None:
    """On held-out questions the enhanced model is far better, and answers in another way."""
    lines = (DEMO / "questions.jsonl").read_text().splitlines()[:60]
    questions = [json.loads(line) for line in lines]
    right, answers = {}, {}
    for name in NAMES:
        with ThreadPoolExecutor(16) as pool:
            replies = pool.map(lambda q, n=name: ask(client, n, q["question"]), questions)
        answers[name] = [reply.choices[0].message.content for reply in replies]
        right[name] = sum(
            text.rstrip().endswith(f"Answer: {q['answer']}")
            for text, q in zip(answers[name], questions, strict=True)
        )
    assert answers["base"] != answers["enhanced@1"]
    # results.json has the whole set with intervals; 60 questions leave room for chance.
    assert right["enhanced@1"] >= right["base"] + 6


def test_fused_engines_answer_to_the_alias_as_who_they_are(fused_demo: RunningServer) -> None:
    """The body goes through as it is; both halves of the users are there, each always the same."""
    client = fused_demo.client()
    messages: Any = [{"role": "user", "content": QUESTION}]
    alone = {name: ask(client, name, QUESTION).choices[0].message.content for name in NAMES}
    found: dict[str, set[str]] = {}
    for user in [*"abcdefgh"] * 2:
        raw = client.chat.completions.with_raw_response.create(
            model=ALIAS, messages=messages, temperature=0, max_tokens=100, user=user
        )
        reply = raw.parse()
        assert (raw.headers["x-rvec-alias"], raw.headers["x-rvec-reason"]) == (ALIAS, "sticky")
        assert reply.model == raw.headers["x-rvec-variant"]
        assert reply.choices[0].message.content == alone[reply.model]
        found.setdefault(user, set()).add(reply.model)
    assert all(len(models) == 1 for models in found.values())
    assert set.union(*found.values()) == set(NAMES)
