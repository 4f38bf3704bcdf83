"""Whatever a client sends, the router's answer is the engine's: byte for byte, client by client.

Each request goes to one real engine twice, straight and through the router. The engine is a dial,
as `make demo` starts it, so the router also has something to add to requests. Where the router
means to differ (aliases, the name in an answer, alphas, the form of refusals), that is said, and
the rest compared. Not here: keys and retries.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import anthropic
import openai
import pytest

from tests.integration.conftest import DEMO
from tests.support.conformance import Case, Load, Way, engine_way, normalised, normalised_json
from tests.support.processes import engine_processes, run_serve, until

if TYPE_CHECKING:
    import http.client
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.engine

T = TypeVar("T")

MODEL = "enhanced@1"
QUESTION = "Start with 46. Add 5. Take 8. What is the result?"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
CONTEXT = 8192
"""Far more than the demo's model was trained for: enough work for a client to run away from."""

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, ANTHROPIC = "/v1/responses", "/v1/messages"

SCHEMA = {
    "type": "object",
    "properties": {"n": {"enum": [7, 43]}},
    "required": ["n"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": SCHEMA}}]
NAMED_TOOL = {"type": "function", "function": {"name": "add"}}
OTHER_TOOL = {"type": "function", "function": {"name": "take"}}
RESPONSES_TOOLS = [{"type": "function", "name": "add", "parameters": SCHEMA, "strict": True}]
ANTHROPIC_TOOLS = [{"name": "add", "description": "Adds.", "input_schema": SCHEMA}]
USAGE = {"include_usage": True}
TOO_LONG = [5] * (CONTEXT + 1)


@dataclass(frozen=True, slots=True)
class Ways:
    """Two ways to one engine."""

    straight: Way
    through: Way


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    """The demo, with room for long prompts, a parser of tools, and a store of responses."""
    flags = [
        *("--max-model-len", str(CONTEXT)),
        *("--hf-overrides", json.dumps({"max_position_embeddings": CONTEXT})),
        *("--max-num-batched-tokens", "128"),  # so that a long prompt takes many steps
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    ]
    arguments = ["--config", str(DEMO / "serve.yaml"), "--", *flags]
    log = tmp_path_factory.mktemp("conformance") / "serve.log"
    with run_serve(arguments, log, env={"VLLM_ENABLE_RESPONSES_API_STORE": "1"}) as server:
        (engine,) = engine_processes(server.process.pid)
        yield Ways(engine_way(engine), Way(server.base_url.removesuffix("/v1"), "none"))


def assert_same(ways: Ways, ask: Callable[[Way], T], *, attempts: int = 1) -> T:
    """Ask by both ways and compare; returns what was answered."""
    for _ in range(attempts):
        straight, through = ask(ways.straight), ask(ways.through)
        if straight == through:
            break
    assert through == straight
    return straight


STREAM_ATTEMPTS = 5
"""An engine that is busy joins two tokens in one event, now and then. What a router did to a stream
it would do each time."""


def attempts(*, is_stream: bool) -> int:
    return STREAM_ATTEMPTS if is_stream else 1


# Bytes


def chat(status: int = 200, **options: Any) -> Case:
    given = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
    return Case(CHAT, given | options, status)


def completion(status: int = 200, **options: Any) -> Case:
    given = {"model": MODEL, "prompt": "Start with 46. Add", "temperature": 0, "max_tokens": 8}
    return Case(COMPLETIONS, given | options, status)


def response(status: int = 200, **options: Any) -> Case:
    given = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 24}
    return Case(RESPONSES, given | options, status)


def message(status: int = 200, **options: Any) -> Case:
    given = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
    return Case(ANTHROPIC, given | options, status)


def other(path: str, status: int = 200, **body: Any) -> Case:
    return Case(path, {"model": MODEL, **body}, status)


GREEDY = {"model": "base", "temperature": 0, "max_tokens": 8}

CASES: dict[str, Case] = {
    "chat": chat(),
    "chat of the other variant": chat(model="base"),
    "chat, system prompt and stop": chat(
        messages=[{"role": "system", "content": "Be short."}, *MESSAGES], stop=["."]
    ),
    "chat, not ASCII": chat(messages=[{"role": "user", "content": "Größe 7 → 8 🙂 \u2028"}]),
    "chat, logprobs": chat(logprobs=True, top_logprobs=3),
    "chat, n": chat(n=2, temperature=1, seed=5),
    "chat, schema": chat(response_format=FORM),
    "chat, any tool": chat(tools=TOOLS, tool_choice="required"),
    "chat, a tool": chat(tools=TOOLS, tool_choice=NAMED_TOOL),
    "chat, tools if it likes": chat(tools=TOOLS),
    "chat, no tool": chat(tools=TOOLS, tool_choice="none"),
    "chat stream": chat(stream=True),
    "chat stream, usage and logprobs": chat(stream=True, stream_options=USAGE, logprobs=True),
    "chat stream, n": chat(stream=True, n=2, temperature=1, seed=5),
    "chat stream, schema": chat(stream=True, response_format=FORM),
    "chat stream, a tool": chat(stream=True, tools=TOOLS, tool_choice=NAMED_TOOL),
    "chat without messages": Case(CHAT, {"model": MODEL}, 400),
    "chat, messages of a wrong type": chat(400, messages="x"),
    "chat, wrong temperature": chat(400, temperature=-1),
    "chat stream, wrong temperature": chat(400, temperature=-1, stream=True),
    "chat, unknown tool": chat(400, tools=TOOLS, tool_choice=OTHER_TOOL),
    "chat, schema left out": chat(400, response_format={"type": "json_schema"}),
    "chat, images": chat(
        400,
        messages=[
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}
        ],
    ),
    "chat, not said to be JSON": Case(
        CHAT, chat().content, 400, headers={"Content-Type": "text/plain"}
    ),
    "completion": completion(),
    "completion, echo and logprobs": completion(echo=True, logprobs=2),
    "completion, logprobs of the prompt": completion(prompt_logprobs=1),
    "completion of token ids": completion(prompt=[44, 55, 66], return_token_ids=True),
    "completions of several prompts": completion(
        prompt=["Add 7", "Take 3"], n=2, temperature=1, seed=3
    ),
    "completion stream": completion(stream=True, stream_options=USAGE, logprobs=1),
    "completion stream, echo": completion(stream=True, echo=True),
    "completion, prompt too long": completion(400, prompt=TOO_LONG),
    "response": response(),
    "response, instructions and no store": response(instructions="Be short.", store=False),
    "response, schema": response(
        text={"format": {"type": "json_schema", "name": "answer", "schema": SCHEMA}}
    ),
    "response, any tool": response(tools=RESPONSES_TOOLS, tool_choice="required"),
    "response stream": response(stream=True),
    "response to one that is not there": response(404, previous_response_id="resp_0"),
    "response, wrong temperature": response(400, temperature=-1),
    "message": message(),
    "message, system prompt and stop": message(system="Be short.", stop_sequences=["."]),
    "message, a tool": message(tools=ANTHROPIC_TOOLS, tool_choice={"type": "tool", "name": "add"}),
    "message stream": message(stream=True),
    "message stream, any tool": message(
        stream=True, tools=ANTHROPIC_TOOLS, tool_choice={"type": "any"}
    ),
    "message without max_tokens": Case(ANTHROPIC, {"model": MODEL, "messages": MESSAGES}, 400),
    "message, wrong temperature": message(400, temperature=-1),
    "tokens of a message": other(f"{ANTHROPIC}/count_tokens", messages=MESSAGES),
    "tokenize": other("/tokenize", prompt="Add 7", return_token_strs=True),
    "tokenize a chat": other("/tokenize", messages=MESSAGES),
    "detokenize": other("/detokenize", tokens=[44, 55]),
    "detokenize what is no token": other("/detokenize", 400, tokens="x"),
    # On these a dial has its default alpha only, under the one name that vLLM knows.
    "chats in a batch": Case(f"{CHAT}/batch", {**GREEDY, "messages": [MESSAGES, MESSAGES]}),
    "chat by SageMaker's path": Case("/invocations", {**GREEDY, "messages": MESSAGES}),
    "scores by generating": Case(
        "/generative_scoring",
        {"model": "base", "query": "x", "items": ["y"], "label_token_ids": [44, 55]},
    ),
    # This engine generates. What it has no path for, it says itself.
    "embeddings": other("/v1/embeddings", 404, input="x"),
    "pooling": other("/pooling", 404, input="x"),
    "classify": other("/classify", 404, input="x"),
    "score": other("/score", 404, text_1="x", text_2="y"),
    "score, v1": other("/v1/score", 404, text_1="x", text_2="y"),
    "rerank": other("/rerank", 404, query="x", documents=["y"]),
    "rerank, v1": other("/v1/rerank", 404, query="x", documents=["y"]),
    "rerank, v2": other("/v2/rerank", 404, query="x", documents=["y"]),
    "a query in the address": Case(f"{CHAT}?a=%20b&a=c", chat().content),
}


@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_the_same_straight_and_through(ways: Ways, name: str) -> None:
    """Status, headers, and every byte of the body or of its events, but for ids and times."""
    case = CASES[name]
    answer = assert_same(
        ways, lambda way: way.send(case), attempts=attempts(is_stream=case.is_stream)
    )
    assert answer.status == case.status, answer.body
    is_stream = ("content-type", "text/event-stream; charset=utf-8") in answer.headers
    assert is_stream == (case.is_stream and case.status == 200)
    assert answer.body


@pytest.mark.parametrize("case", [chat(), chat(400, temperature=-1)], ids=["answer", "error"])
def test_an_answer_says_who_was_asked(ways: Ways, case: Case) -> None:
    """The client's id is the engine's, too; the headers of the variant are the router's alone."""
    said = Case(case.path, case.body, headers={"X-Request-Id": "conformance-1"})
    reply = ways.through.reply(said)
    assert reply.status_code == case.status
    assert reply.headers["x-request-id"] == "conformance-1"
    assert reply.headers["x-rvec-variant"] == MODEL
    assert reply.headers["x-rvec-alpha"] == "1"
    assert reply.headers["x-rvec-reason"] == "explicit"
    if case.status == 200:
        assert reply.json()["id"] == "chatcmpl-conformance-1"


# Clients


@dataclass(frozen=True, slots=True)
class Call:
    """A method of a client, and what it is given."""

    method: str
    options: dict[str, Any]
    error: str = ""
    """The exception that it raises."""

    @property
    def is_stream(self) -> bool:
        """Whether it gives events."""
        return bool(self.options.get("stream")) or self.method.endswith(".stream")

    def of(self, client: Any) -> Any:
        """Call it."""
        for name in self.method.split("."):
            client = getattr(client, name)
        return client(**self.options)

    def with_options(self, **options: Any) -> Call:
        """The same with others in place of some options."""
        return Call(self.method, self.options | options, self.error)

    def with_raw_response(self, client: Any) -> Any:
        """Call it, and get the answer with its headers."""
        where, _, last = self.method.rpartition(".")
        return Call(f"{where}.with_raw_response.{last}", self.options).of(client)


def call(method: str, case: Case, error: str = "") -> Call:
    """The same request as a case, said to a client."""
    assert isinstance(case.body, dict)
    extra = set(UNKNOWN_TO_CLIENTS[method.partition(".")[0]]) & set(case.body)
    known = {name: value for name, value in case.body.items() if name not in extra}
    return Call(method, known | {"extra_body": {n: case.body[n] for n in extra}}, error)


UNKNOWN_TO_CLIENTS = {
    "chat": ("alpha",),
    "completions": ("return_token_ids",),
    "embeddings": (),
    "messages": ("alpha", "temperature"),  # newer models have no temperature; vLLM's have
    "responses": (),
}
"""What vLLM takes, and these clients pass on only if it is said to be extra."""

BAD, MISSING = "BadRequestError", "NotFoundError"
CREATE, COMPLETE, RESPOND = "chat.completions.create", "completions.create", "responses.create"

OPENAI_CALLS: dict[str, Call] = {
    "chat": call(CREATE, chat()),
    "chat, logprobs": call(CREATE, CASES["chat, logprobs"]),
    "chat, schema": call("chat.completions.parse", CASES["chat, schema"]),
    "chat, a tool": call(CREATE, CASES["chat, a tool"]),
    "chat stream": call(CREATE, CASES["chat stream, usage and logprobs"]),
    "chat stream, a tool": call(CREATE, CASES["chat stream, a tool"]),
    "chat stream, helper": call("chat.completions.stream", chat(tools=TOOLS, tool_choice="none")),
    "chat, wrong temperature": call(CREATE, chat(temperature=-1), BAD),
    "chat stream, wrong temperature": call(CREATE, chat(temperature=-1, stream=True), BAD),
    "completion": call(COMPLETE, CASES["completion, echo and logprobs"]),
    "completion stream": call(COMPLETE, CASES["completion stream"]),
    "response": call(RESPOND, response()),
    "response stream": call(RESPOND, CASES["response stream"]),
    "response stream, helper": call("responses.stream", response()),
    "response to one that is not there": call(
        RESPOND, response(previous_response_id="resp_0"), MISSING
    ),
    "embeddings": call("embeddings.create", CASES["embeddings"], MISSING),
}

SAY = "messages.create"

ANTHROPIC_CALLS: dict[str, Call] = {
    "message": call(SAY, message()),
    "message, system prompt and stop": call(SAY, CASES["message, system prompt and stop"]),
    "message, a tool": call(SAY, CASES["message, a tool"]),
    "message stream": call(SAY, message(stream=True)),
    "message stream, any tool": call(SAY, CASES["message stream, any tool"]),
    "message stream, helper": call("messages.stream", message()),
    "tokens of a message": call("messages.count_tokens", CASES["tokens of a message"]),
    "message, wrong temperature": call(SAY, message(temperature=-1), BAD),
    "message, wrong role": call(SAY, message(messages=[{"role": "nobody", "content": "x"}]), BAD),
}


def plain(value: Any) -> Any:
    """What a client made of an answer, as JSON has it."""
    return value.model_dump(mode="json", warnings=False)


def failure(error: openai.APIStatusError | anthropic.APIStatusError) -> dict[str, Any]:
    return {"error": type(error).__name__, "status": error.status_code, "body": error.body}


def outcome(made: Call, client: Any) -> Any:
    """What a call gives, or raises."""
    try:
        result = made.of(client)
        if made.method.endswith(".stream"):
            with result as events:
                return [plain(event) for event in events]
        return [plain(event) for event in result] if made.is_stream else plain(result)
    except (openai.APIStatusError, anthropic.APIStatusError) as exc:
        return failure(exc)


async def async_outcome(made: Call, client: Any) -> Any:
    """The same of an asynchronous client."""
    try:
        async with client:
            if made.method.endswith(".stream"):
                async with made.of(client) as events:
                    return [plain(event) async for event in events]
            result = await made.of(client)
            if made.is_stream:
                return [plain(event) async for event in result]
            return plain(result)
    except (openai.APIStatusError, anthropic.APIStatusError) as exc:
        return failure(exc)


def assert_same_outcome(ways: Ways, made: Call, ask: Callable[[Way], Any]) -> None:
    tries = attempts(is_stream=made.is_stream)
    found = json.loads(assert_same(ways, lambda way: normalised_json(ask(way)), attempts=tries))
    raised = found["error"] if isinstance(found, dict) and "status" in found else ""
    assert (raised if made.error else "") == made.error
    assert len(found) > 1 or not made.is_stream


@pytest.mark.parametrize("name", OPENAI_CALLS)
def test_openais_client_sees_the_same(ways: Ways, name: str) -> None:
    """Objects, events, and exceptions with their bodies."""
    made = OPENAI_CALLS[name]
    assert_same_outcome(ways, made, lambda way: outcome(made, way.openai_client()))


ASYNC_OPENAI_CALLS = (
    *("chat", "chat stream", "chat stream, helper", "chat stream, wrong temperature"),
    *("completion stream", "response", "response stream, helper"),
)
"""How answers are read is the client's own; what is in them, the other one has shown."""


@pytest.mark.parametrize("name", ASYNC_OPENAI_CALLS)
def test_openais_async_client_sees_the_same(ways: Ways, name: str) -> None:
    """As the other one."""
    made = OPENAI_CALLS[name]
    assert_same_outcome(
        ways, made, lambda way: asyncio.run(async_outcome(made, way.async_openai_client()))
    )


@pytest.mark.parametrize("name", ANTHROPIC_CALLS)
def test_anthropics_client_sees_the_same(ways: Ways, name: str) -> None:
    """Objects, events, and exceptions with their bodies."""
    made = ANTHROPIC_CALLS[name]
    assert_same_outcome(ways, made, lambda way: outcome(made, way.anthropic_client()))


ASYNC_ANTHROPIC_CALLS = ("message", "message stream, helper", "message, wrong temperature")


@pytest.mark.parametrize("name", ASYNC_ANTHROPIC_CALLS)
def test_anthropics_async_client_sees_the_same(ways: Ways, name: str) -> None:
    """As the other one."""
    made = ANTHROPIC_CALLS[name]
    assert_same_outcome(
        ways, made, lambda way: asyncio.run(async_outcome(made, way.async_anthropic_client()))
    )


# Responses, which an engine remembers


@pytest.fixture(scope="module")
def remembered(ways: Ways) -> Any:
    """A response that was made through the router, and that the engine keeps."""
    return ways.through.openai_client().responses.create(
        model=MODEL, input=QUESTION, temperature=0, max_output_tokens=24
    )


def test_a_response_is_followed_up(ways: Ways, remembered: Any) -> None:
    """By both ways with the same answer, which knows what came before."""
    made = call(RESPOND, response(input="Add 5.", previous_response_id=remembered.id))
    found = json.loads(
        assert_same(ways, lambda way: normalised_json(outcome(made, way.openai_client())))
    )
    assert found["usage"]["input_tokens"] > remembered.usage.total_tokens


def test_a_response_is_got_again(ways: Ways, remembered: Any) -> None:
    """By its id, which names no model."""
    answer = assert_same(ways, lambda way: way.send(Case(f"{RESPONSES}/{remembered.id}")))
    assert answer.status == 200
    again = ways.through.openai_client().responses.retrieve(remembered.id)
    assert again.output_text == remembered.output_text


def test_a_finished_response_cant_be_cancelled(ways: Ways, remembered: Any) -> None:
    """In the engine's own words."""
    made = Call("responses.cancel", {"response_id": remembered.id}, BAD)
    assert_same_outcome(ways, made, lambda way: outcome(made, way.openai_client()))


def test_a_response_in_the_background_is_cancelled(ways: Ways) -> None:
    """Through the router: it ends in the engine."""
    client = ways.through.openai_client()
    begun = client.responses.create(
        model=MODEL, input=QUESTION, background=True, max_output_tokens=LONG, extra_body=ENDLESS
    )
    straight = ways.straight.openai_client()
    try:
        assert begun.status == "queued"
        until(lambda: Load.of(ways.straight).running > 0, "the engine is at work", 10)
        assert client.responses.cancel(begun.id).status == "cancelled"
        assert straight.responses.retrieve(begun.id).status == "cancelled"
        until(lambda: Load.of(ways.straight).is_idle, "the engine has stopped", ABORT_SECONDS)
    finally:
        # The other tests need an idle engine, whatever has become of this one.
        with contextlib.suppress(openai.BadRequestError):
            straight.responses.cancel(begun.id)


def test_events_of_a_response_are_got_again(ways: Ways) -> None:
    """Of one that was streamed in the background: the same bytes by both ways."""
    client = ways.through.openai_client()
    events = list(
        client.responses.create(
            model=MODEL, input=QUESTION, background=True, stream=True, max_output_tokens=24
        )
    )
    assert events[0].type == "response.created"
    path = f"{RESPONSES}/{events[0].response.id}?stream=true&starting_after=2"
    answer = assert_same(ways, lambda way: way.send(Case(path)))
    assert answer.body.count(b"data: ") == len(events) - 3


# Aliases, which the router alone knows

ALIAS = "assistant"
"""Half of the users get each of the demo's variants."""


@pytest.fixture(scope="module")
def users(ways: Ways) -> dict[str, str]:
    """A user of each variant."""
    found: dict[str, str] = {}
    for number in range(32):
        case = chat(model=ALIAS, user=f"user-{number}", max_tokens=1)
        found.setdefault(ways.through.reply(case).headers["x-rvec-variant"], f"user-{number}")
        if len(found) == 2:
            return found
    raise AssertionError(f"one variant has all users: {found}")


ALIAS_CALLS: dict[str, Call] = {
    "chat": call(CREATE, chat()),
    "chat stream": call(CREATE, chat(stream=True, stream_options=USAGE)),
    "response": call(RESPOND, response()),
    "message": call(SAY, message()),
    "message stream": call(SAY, message(stream=True)),
}


@pytest.mark.parametrize("variant", ["base", MODEL])
@pytest.mark.parametrize("name", ALIAS_CALLS)
def test_an_alias_is_answered_as_by_the_users_variant(
    ways: Ways, users: dict[str, str], name: str, variant: str
) -> None:
    """To the byte; `model` says which variant it was, the headers also why."""
    made, user = ALIAS_CALLS[name], users[variant]
    asked = made.with_options(model=ALIAS, **said_user(made, user))
    own = made.with_options(model=variant)
    for _ in range(attempts(is_stream=made.is_stream)):
        found = outcome(asked, client_of(made, ways.through))
        straight = outcome(own, client_of(made, ways.straight))
        # `user` stands in a response, as it was sent.
        text, expected = (normalised_json(each) for each in (found, straight))
        text = text.replace(f'"user":"{user}"', '"user":null')
        if text == expected:
            break
    assert text == expected
    assert models_in(text) == {variant}
    raw = asked.with_raw_response(client_of(made, ways.through))
    said = {key: raw.headers[f"x-rvec-{key}"] for key in ("variant", "alias", "reason")}
    assert said == {"variant": variant, "alias": ALIAS, "reason": "sticky"}


def said_user(made: Call, user: str) -> dict[str, Any]:
    """Who asks: OpenAI's clients have a field for it, Anthropic's a header of ours."""
    is_anthropic = made.method.startswith("messages")
    return {"extra_headers": {"X-Rvec-Key": user}} if is_anthropic else {"user": user}


def client_of(made: Call, way: Way) -> Any:
    return way.anthropic_client() if made.method.startswith("messages") else way.openai_client()


def test_openais_async_client_asks_an_alias(ways: Ways, users: dict[str, str]) -> None:
    """As the other one."""
    made = call(CREATE, chat(model=ALIAS, user=users[MODEL], stream=True))
    events = asyncio.run(async_outcome(made, ways.through.async_openai_client()))
    assert {event["model"] for event in events} == {MODEL}


def test_an_alias_without_a_user_is_answered_by_chance(ways: Ways) -> None:
    """By one of its variants, which is named in the answer."""
    reply = ways.through.reply(chat(model=ALIAS, max_tokens=1))
    assert reply.headers["x-rvec-reason"] == "random"
    assert reply.json()["model"] == reply.headers["x-rvec-variant"]
    assert reply.json()["model"] in {"base", MODEL}


def test_aliases_are_listed_beside_the_variants(ways: Ways) -> None:
    """Each can be looked up."""
    client = ways.through.openai_client()
    cards = {card.id: card.to_dict() for card in client.models.list()}
    assert list(cards) == ["base", MODEL, ALIAS]
    assert cards[ALIAS]["rvec"] == {"split": {"base": 50, MODEL: 50}}
    assert client.models.retrieve(ALIAS).id == ALIAS


def test_a_follow_up_through_an_alias_stays_with_its_variant(
    ways: Ways, users: dict[str, str]
) -> None:
    """Whoever asks: here the user of another one. It goes on from what came before."""
    client = ways.through.openai_client()
    first = client.responses.create(
        model=ALIAS, input=QUESTION, temperature=0, max_output_tokens=24, user=users[MODEL]
    )
    follow_up = response(input="Add 5.", previous_response_id=first.id)
    straight = outcome(call(RESPOND, follow_up), ways.straight.openai_client())
    raw = client.responses.with_raw_response.create(
        model=ALIAS,
        input="Add 5.",
        temperature=0,
        max_output_tokens=24,
        previous_response_id=first.id,
        user=users["base"],
    )
    second = raw.parse()
    assert (first.model, second.model) == (MODEL, MODEL)
    assert (raw.headers["x-rvec-alias"], raw.headers["x-rvec-reason"]) == (ALIAS, "owner")
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens == straight["usage"]["input_tokens"] > first.usage.total_tokens
    assert second.output_text == straight["output"][0]["content"][0]["text"]


# Alphas, of which the router knows more than the engine

OWN_ALPHA_CALLS: dict[str, Call] = {
    "chat": call(CREATE, chat(model="base", alpha=0.5)),
    "chat stream": call(CREATE, chat(model="base", alpha=0.5, stream=True)),
    "message": call(SAY, message(model="base", alpha=0.5)),
}


@pytest.mark.parametrize("name", OWN_ALPHA_CALLS)
def test_an_alpha_of_its_own_is_answered_under_its_own_name(ways: Ways, name: str) -> None:
    """The router's answer says who answered, the engine's what was asked; all else is the same."""
    made = OWN_ALPHA_CALLS[name]
    for _ in range(attempts(is_stream=made.is_stream)):
        straight, through = (
            normalised_json(outcome(made, client_of(made, way)))
            for way in (ways.straight, ways.through)
        )
        if straight.replace('"model":"base"', '"model":"enhanced@0.5"') == through:
            break
    assert (models_in(straight), models_in(through)) == ({"base"}, {"enhanced@0.5"})
    assert straight.replace('"model":"base"', '"model":"enhanced@0.5"') == through


def models_in(text: str) -> set[str]:
    return set(re.findall(r'"model":"([^"]*)"', text))


def test_an_alpha_of_its_own_is_the_reason(ways: Ways) -> None:
    """In bytes, too, the name is all that differs."""
    case = chat(model="base", alpha=0.5)
    reply = ways.through.reply(case)
    assert reply.headers["x-rvec-variant"] == "enhanced@0.5"
    assert reply.headers["x-rvec-reason"] == "alpha"
    assert reply.headers["x-rvec-alpha"] == "0.5"
    straight = ways.straight.send(case).body
    named = straight.replace(b'"model":"base"', b'"model":"enhanced@0.5"')
    assert normalised(reply.content) == named != straight


@pytest.mark.parametrize("asked", [{"model": MODEL}, {"alpha": 0.5}], ids=["a name", "an alpha"])
@pytest.mark.parametrize(
    "name", ["chats in a batch", "chat by SageMaker's path", "scores by generating"]
)
def test_a_path_without_alphas_answers_the_default_alone(
    ways: Ways, name: str, asked: dict[str, Any]
) -> None:
    """Any other is refused, which no engine would answer as it was meant."""
    case = CASES[name]
    assert isinstance(case.body, dict)
    reply = ways.through.reply(Case(case.path, case.body | asked))
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert_openais_form(error)
    assert error["code"] == "invalid_alpha"


# Refusals of the router's own


@dataclass(frozen=True, slots=True)
class Refusal:
    """What engine and router refuse each in its own words."""

    call: Call
    """With the exception that the router's answer raises."""
    code: str
    """The router's."""
    straight: str = MISSING
    """The exception that the engine's raises."""


REFUSALS: dict[str, Refusal] = {
    "chat of nobody": Refusal(call(CREATE, chat(model="nobody"), MISSING), "model_not_found"),
    "chat stream of nobody": Refusal(
        call(CREATE, chat(model="nobody", stream=True), MISSING), "model_not_found"
    ),
    "completion of nobody": Refusal(
        call(COMPLETE, completion(model="nobody"), MISSING), "model_not_found"
    ),
    "response of nobody": Refusal(
        call(RESPOND, response(model="nobody"), MISSING), "model_not_found"
    ),
    "message of nobody": Refusal(call(SAY, message(model="nobody"), MISSING), "model_not_found"),
    "tokens of nobody": Refusal(
        call("messages.count_tokens", other("", model="nobody", messages=MESSAGES), MISSING),
        "model_not_found",
    ),
    # The router has looked for who has it; the engine knows itself only.
    "chat at an alpha out of range": Refusal(
        call(CREATE, chat(alpha=99), MISSING), "alpha_not_found", BAD
    ),
    "message at an alpha out of range": Refusal(
        call(SAY, message(alpha=99), MISSING), "alpha_not_found", BAD
    ),
    "chat at an alpha that is none": Refusal(
        call(CREATE, chat(alpha="much"), BAD), "invalid_alpha", BAD
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_raises_the_clients_own_exception(ways: Ways, name: str) -> None:
    """Through as straight, but for an alpha out of range; in OpenAI's form."""
    refusal, refused = REFUSALS[name], REFUSALS[name].call
    straight, through = (
        outcome(refused, client_of(refused, way)) for way in (ways.straight, ways.through)
    )
    assert (straight["error"], through["error"]) == (refusal.straight, refused.error)
    # OpenAI's client shows what is inside of `error`, Anthropic's the whole.
    is_anthropic = refused.method.startswith("messages")
    assert_openais_form(through["body"]["error"] if is_anthropic else through["body"])
    assert refusal.code in str(through["body"])


def assert_openais_form(error: dict[str, Any]) -> None:
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_response_that_nobody_made_is_not_found(ways: Ways) -> None:
    """The router need not know whom to ask."""
    made = Call("responses.retrieve", {"response_id": "resp_0"}, MISSING)
    straight, through = (
        outcome(made, way.openai_client()) for way in (ways.straight, ways.through)
    )
    assert through["error"] == straight["error"] == MISSING
    assert_openais_form(through["body"])


@pytest.mark.parametrize("body", [b"{nonsense", b"[]", b"\xff", b""], ids=repr)
def test_what_is_no_json_object_is_a_400(ways: Ways, body: bytes) -> None:
    """The router must read the model's name, so it can't leave that to the engine."""
    straight, through = (way.send(Case(CHAT, body)) for way in (ways.straight, ways.through))
    assert through.status == straight.status == 400
    assert_openais_form(json.loads(through.body)["error"])


def test_a_body_beyond_64_mib_is_a_413(ways: Ways) -> None:
    """An engine would take it."""
    huge = chat(messages=[{"role": "user", "content": "x" * 64 * 2**20}])
    found = outcome(call(CREATE, huge), ways.through.openai_client())
    assert (found["error"], found["status"]) == ("APIStatusError", 413)
    assert_openais_form(found["body"])


# Clients that go away

LONG = 7000
"""Tokens of a prompt or of an answer: seconds of work."""
CLIENTS = 16
ABORT_SECONDS = 2.0
ENDLESS = {"ignore_eos": True}


@dataclass(frozen=True, slots=True)
class Phase:
    """When clients go away."""

    prompt_tokens: int
    is_stream: bool
    has_tokens: bool
    """Whether the engine is at the answers by then, not still at the prompts."""


PHASES = {
    "prefill": Phase(LONG, is_stream=True, has_tokens=False),
    "prefill, whole answer": Phase(LONG, is_stream=False, has_tokens=False),
    "stream": Phase(8, is_stream=True, has_tokens=True),
    "whole answer": Phase(8, is_stream=False, has_tokens=True),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_goes_away_ends_the_work(ways: Ways, phase: str) -> None:
    """Within 2 s nothing is left to do for the engine, which had seconds of work."""
    engine, way, wanted = ways.straight, ways.through, PHASES[phase]
    until(lambda: Load.of(engine).is_idle, "the engine has nothing to do", 10)
    before = Load.of(engine).generated
    clients = [leave_open(way, wanted, f"{phase} {n}") for n in range(CLIENTS)]

    def is_there() -> bool:
        load = Load.of(engine)
        assert wanted.has_tokens or load.generated == before, "too late: a prompt is done"
        everybody = load.running + load.waiting == CLIENTS
        return everybody and load.running > 0 and (load.generated > before) == wanted.has_tokens

    try:
        until(is_there, f"the engine is at work for all: {phase}", 20)
        if wanted.is_stream and wanted.has_tokens:
            assert all(b"data: " in client.getresponse().read(6) for client in clients)
        assert Load.of(engine).running > 0
    finally:
        for client in clients:
            client.close()
    until(lambda: Load.of(engine).is_idle, "the engine has nothing to do", ABORT_SECONDS)
    made = Load.of(engine).generated - before
    assert made < CLIENTS * LONG / 4


def leave_open(way: Way, phase: Phase, salt: str) -> http.client.HTTPConnection:
    """Send a request that takes long, with a prompt that no cache has."""
    prompt = [3 + byte for byte in salt.encode()]
    body = {
        "model": MODEL,
        "prompt": (prompt * phase.prompt_tokens)[: phase.prompt_tokens],
        "max_tokens": CONTEXT - phase.prompt_tokens - 1,
        "stream": phase.is_stream,
        **ENDLESS,
    }
    return way.open(COMPLETIONS, body)
