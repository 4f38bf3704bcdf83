"""Every path of the installed vLLM is forwarded, denied or the router's own; forms are read."""

from __future__ import annotations

import ast
import asyncio
import doctest
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser

from vllm_rvec.router import paths
from vllm_rvec.router.paths import (
    DENIED,
    FORWARDED,
    MAX_NAME_BYTES,
    MAX_PART_HEADER_BYTES,
    MAX_PARTS,
    MODEL_HEADERS,
    OWN,
    Kind,
    denial,
    read_form_model,
)
from vllm_rvec.router.shadow import SHADOWED_PATHS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

ROUTES_OF_THE_SERVER = """
import json, sys
from typing import get_args
from vllm import tasks
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

class AnyModel:
    def __getattr__(self, name): return None
    def get_pooling_task(self, supported): return "embed"

argv = ["--profiler-config.profiler=torch", "--profiler-config.torch_profiler_dir=/tmp/unused"]
args = make_arg_parser(FlexibleArgumentParser()).parse_args(argv)
for name, value in vars(args).items():
    if name.startswith("enable_") and not value:
        setattr(args, name, True)
app = build_app(args, tuple(get_args(tasks.SupportedTask)), AnyModel())
found = set()
for route in app.routes:
    kind = "WEBSOCKET" if "WebSocket" in type(route).__name__ else "MOUNT"
    for method in getattr(route, "methods", None) or {kind}:
        found.add((method, route.path))
print("ROUTES " + json.dumps(sorted(found)))
"""
"""Builds vLLM's server with every gate open, and no engine."""

GATES = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_ENABLE_COHERE_API": "1",
    "VLLM_PLUGINS": "rvec_admin",
}

METHODS = ("get", "post", "put", "delete", "patch", "websocket")
OTHER_CALLS = ("add_api_route", "add_route", "add_websocket_route", "mount", "api_route", "Mount")

CONTENT_TYPE = "multipart/form-data; boundary=b"
MODEL = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nbase\r\n'
FILE = (
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
    b"Content-Type: audio/wav\r\n\r\nRIFF\x00\xff\r\n--bb\r\n\r\n--b-\r\r\n\r\n"
)
END = b"--b--\r\n"


@pytest.fixture(scope="module")
def routes() -> set[tuple[str, str]]:
    """What the server has, and what its source has for packages that are not installed."""
    answer = subprocess.run(
        [sys.executable, "-c", ROUTES_OF_THE_SERVER],
        env={**os.environ, **GATES},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    said = [line for line in answer.stdout.splitlines() if line.startswith("ROUTES ")]
    assert said, answer.stderr[-4_000:]
    built = {(method, path) for method, path in json.loads(said[0].removeprefix("ROUTES "))}
    assert len(built) > 60
    return (built | set(routes_in_source())) - {(m, p) for m, p in built if m == "HEAD"}


def routes_in_source() -> Iterator[tuple[str, str]]:
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    home = Path(spec.origin).parent
    for folder in ("entrypoints", "plugins"):
        for file in (home / folder).rglob("*.py"):
            if "fastapi" in (text := file.read_text()):
                yield from routes_of(ast.parse(text))


def routes_of(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not call.args:
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        path = getattr(call.args[0], "value", None)
        if not isinstance(path, str) or not path.startswith("/"):
            continue
        if name in METHODS:
            yield name.upper(), path
        elif name in OTHER_CALLS:
            yield "ANY", path


def test_every_route_of_vllm_is_decided_on(routes: set[tuple[str, str]]) -> None:
    """A new release can't bring a path that nobody has looked at."""
    forwarded = {(path.method, path.template) for path in FORWARDED}
    known = {path.template for path in FORWARDED} | OWN
    left = {
        (method, path)
        for method, path in routes
        if not ((method, path) in forwarded or path in OWN or denial(path))
        and not (method == "ANY" and path in known)
    }
    assert left == set()


def test_all_that_is_forwarded_is_there(routes: set[tuple[str, str]]) -> None:
    """The list has no path that vLLM no longer serves."""
    assert {(path.method, path.template) for path in FORWARDED} <= routes


def test_all_that_is_denied_is_there(routes: set[tuple[str, str]]) -> None:
    """FastAPI's second documentation page is left out when vLLM serves its own."""
    served = {path for _, path in routes}
    stale = {gone for gone in DENIED if not any(f"{p}/".startswith(f"{gone}/") for p in served)}
    assert stale == {"/redoc"}


def test_nothing_is_decided_on_twice() -> None:
    """No forwarded path lies below a denied one, nor is it the router's own."""
    assert [path.template for path in FORWARDED if denial(path.template)] == []
    assert {path.template for path in FORWARDED} & OWN == set()
    assert [path for path in OWN if denial(path)] == []
    assert len({(path.method, path.template) for path in FORWARDED}) == len(FORWARDED)


def test_only_what_generates_is_shadowed() -> None:
    """Embeddings have nothing to compare; stored responses are nobody else's."""
    generating = {path.template for path in FORWARDED if path.is_generating}
    assert {"/v1/chat/completions", "/v1/completions", "/v1/messages"} <= SHADOWED_PATHS
    assert generating >= SHADOWED_PATHS
    assert not any(path.startswith("/v1/responses/") for path in SHADOWED_PATHS)


def test_only_stored_responses_leave_something_behind() -> None:
    """Making one, and cancelling it."""
    assert {path.template for path in FORWARDED if path.is_stateful} == {
        "/v1/responses",
        "/v1/responses/{response_id}/cancel",
    }


def test_where_the_model_is_named() -> None:
    """Forms are those of audio; only follow-ups name none."""
    forms = {path.template for path in FORWARDED if path.kind is Kind.FORM}
    owned = {path.template for path in FORWARDED if path.kind is Kind.OWNER}
    assert forms == {"/v1/audio/transcriptions", "/v1/audio/translations"}
    assert owned == {path.template for path in FORWARDED if "{response_id}" in path.template}


def test_the_headers_that_name_another_model_are_those_of_sagemaker() -> None:
    """As the package that vLLM serves `/invocations` with writes them."""
    # In a process of its own: it sets up logging for the one that imports it.
    code = (
        "from model_hosting_container_standards.sagemaker.lora import constants\n"
        "from model_hosting_container_standards.sagemaker.sessions import models\n"
        "print(constants.SageMakerLoRAApiHeader.ADAPTER_IDENTIFIER)\n"
        "print(models.SageMakerSessionHeader.SESSION_ID)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {line.lower() for line in done.stdout.splitlines()[-2:]} == MODEL_HEADERS


@pytest.mark.parametrize(
    "path", ["/sleep", "/sleep/", "//sleep", "/adapters/x", "/docs/oauth2-redirect", "/static/a.js"]
)
def test_a_denied_path_has_its_reason_however_it_is_written(path: str) -> None:
    """With what lies below it."""
    assert denial(path)


@pytest.mark.parametrize(
    "path", ["", "/", "/sleepy", "/v1", "/v1/rvec/variants", "/v1/sleep", "/SLEEP", "/a/" * 9_000]
)
def test_other_paths_have_none(path: str) -> None:
    """Only whole segments count."""
    assert denial(path) is None


def test_a_websocket_is_refused_for_what_it_is() -> None:
    """So that nobody looks for a wrong key or model."""
    assert denial("/v1/realtime") == "it is a WebSocket, and the router speaks HTTP only"


@pytest.mark.parametrize("reason", sorted(set(DENIED.values())))
def test_reasons_can_follow_because(reason: str) -> None:
    """Each is the rest of a sentence."""
    assert reason.startswith("it ")
    assert not reason.endswith(".")


@pytest.mark.parametrize(
    "form",
    [
        MODEL + FILE + END,
        FILE + MODEL + END,
        b"\r\n".join([MODEL.replace(b'"', b"").rstrip(), END]),
        MODEL.replace(b"Content-Disposition", b"content-type: text/plain\r\nCONTENT-DISPOSITION")
        + END,
    ],
)
def test_the_model_is_found_in_a_form(form: bytes) -> None:
    """Before the file and behind it, whatever the file has in it."""
    assert read_form_model(form, CONTENT_TYPE) == "base"
    assert starlettes_model(form) == "base"


def test_a_name_in_utf8_is_found() -> None:
    """The router decides whether there is such a variant."""
    assert read_form_model(MODEL.replace(b"base", "é".encode()) + END, CONTENT_TYPE) == "é"


@pytest.mark.parametrize(
    "content_type",
    [
        'multipart/form-data; boundary="b"',
        "Multipart/Form-Data;charset=utf-8;Boundary=b",
        "multipart/form-data; boundary=b;",
    ],
)
def test_content_types_are_read_as_they_are_written(content_type: str) -> None:
    """Quoted, in other letters, with other options."""
    assert read_form_model(MODEL + END, content_type) == "base"


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "application/json",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=b; boundary=b",
        "multipart/form-data; boundary=" + "b" * 71,
        'multipart/form-data; boundary="b\\"',
        "multipart/form-data; boundary=ä",
        "multipart/form-data; boundary=b; " + "x=y" * MAX_PART_HEADER_BYTES,
        "multipart/mixed; boundary=b",
    ],
)
def test_without_one_boundary_nothing_is_read(content_type: str) -> None:
    """And nothing is guessed."""
    assert read_form_model(MODEL + END, content_type) is None


@pytest.mark.parametrize(
    "form",
    [
        b"",
        END,
        FILE + END,
        MODEL + MODEL.replace(b"base", b"other") + END,
        MODEL,
        MODEL + FILE,
        b"preamble\r\n" + MODEL + END,
        MODEL.replace(b'"model"', b'"model"; filename="x"') + END,
        MODEL.replace(b'"model"', b'"model"; name="other"') + END,
        MODEL.replace(b"Content-Disposition", b"X-Disposition") + END,
        MODEL.replace(b"\r\n\r\n", b"\r\nContent-Disposition: form-data; name=x\r\n\r\n") + END,
        MODEL.replace(b"base", b"") + END,
        MODEL.replace(b"base", b"\xff") + END,
        MODEL.replace(b"base", b"x" * (MAX_NAME_BYTES + 1)) + END,
        MODEL.replace(b"\r\n\r\n", b"\r\nX: " + b"x" * MAX_PART_HEADER_BYTES + b"\r\n\r\n") + END,
        MODEL.replace(b"\r\n", b"\n") + END,
    ],
)
def test_a_form_that_does_not_say_one_model_has_none(form: bytes) -> None:
    """None, two, cut off, too long, or to be read in two ways."""
    assert read_form_model(form, CONTENT_TYPE) is None


def test_a_form_of_very_many_parts_is_given_up() -> None:
    """So are very many look-alikes of a boundary: the time is bounded."""
    field = b"--b\r\nContent-Disposition: form-data; name=x\r\n\r\n\r\n"
    assert read_form_model(MODEL + field * MAX_PARTS + END, CONTENT_TYPE) is None
    assert read_form_model(MODEL + FILE + b"\r\n--bx" * MAX_PARTS + END, CONTENT_TYPE) is None


PIECES = [
    *(b"--b", b"--", b"\r\n", b"\r", b"\n", b"-", b"b", b"\r\n\r\n", b" ", b";", b'"', b"\\"),
    *(b"Content-Disposition: form-data", b"; name=model", b'; name="model"', b"; name=x", b":"),
    *(b"; filename=f", b"; name*=utf-8''model", b"\r\n--b\r\n", b"\r\n--b--", b"base", b"other"),
    *(MODEL, FILE, END),
]


@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=3), max_size=16).map(b"".join))
def test_the_engine_finds_no_other_model_than_the_router(middle: bytes) -> None:
    """Whatever a client sends: vLLM's own reader finds the same, or refuses the form."""
    for form in (middle, MODEL + middle + END, MODEL + middle, middle + MODEL + END):
        found = read_form_model(form, CONTENT_TYPE)
        if found is not None:
            assert starlettes_model(form) in {found, None}


@given(st.binary(max_size=100), st.text(max_size=60))
def test_nothing_that_comes_raises(form: bytes, content_type: str) -> None:
    """Noise has no model."""
    read_form_model(form, content_type)
    read_form_model(form, f"multipart/form-data; boundary={content_type}")


def starlettes_model(form: bytes) -> str | None:
    """What vLLM's server reads; None where it refuses."""

    async def stream() -> AsyncGenerator[bytes, None]:
        yield form
        yield b""

    async def read() -> object:
        parser = MultiPartParser(Headers({"Content-Type": CONTENT_TYPE}), stream())
        async with asyncio.timeout(5):
            return (await parser.parse()).get("model")

    try:
        model = asyncio.run(read())
    except MultiPartException:
        return None
    return model if isinstance(model, str) else None


def test_the_examples_in_the_docstrings_hold() -> None:
    """Documentation that runs."""
    assert doctest.testmod(paths).failed == 0
