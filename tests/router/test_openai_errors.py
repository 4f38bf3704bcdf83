"""OpenAI's error body, and which status each of our errors gets."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from vllm_rvec.errors import ConfigError, RvecError, UpstreamError
from vllm_rvec.router import UnknownVariantError, VariantDownError
from vllm_rvec.router.openai_errors import (
    RequestRefusedError,
    answer_error,
    error_body,
    error_response,
)

if TYPE_CHECKING:
    from aiohttp import web


def read_error(response: web.Response) -> dict[str, Any]:
    body = response.body
    assert isinstance(body, bytes)
    error = json.loads(body)["error"]
    assert isinstance(error, dict)
    return error


def test_the_body_has_openais_four_fields_on_one_line() -> None:
    """It must fit behind `data:` too, whatever the message."""
    body = error_body(400, "two\nlines", code="invalid_json", param="model")
    assert b"\n" not in body
    assert json.loads(body) == {
        "error": {
            "message": "two\nlines",
            "type": "invalid_request_error",
            "param": "model",
            "code": "invalid_json",
        }
    }


def test_the_type_says_whose_fault_it_is() -> None:
    """Below 500 the client's, from there on the server's."""
    assert json.loads(error_body(499, "", code="c"))["error"]["type"] == "invalid_request_error"
    assert json.loads(error_body(500, "", code="c"))["error"]["type"] == "server_error"


def test_a_response_carries_the_body_and_extra_headers() -> None:
    """JSON, with the headers given."""
    response = error_response(405, "no", code="c", headers={"Allow": "POST"})
    assert (response.status, response.content_type) == (405, "application/json")
    assert response.headers["Allow"] == "POST"


@pytest.mark.parametrize(
    ("error", "status", "code", "param"),
    [
        (UnknownVariantError("x", ["base"]), 404, "model_not_found", "model"),
        (VariantDownError("base", "starting"), 503, "model_down", "model"),
        (UpstreamError("The engine is gone."), 502, "upstream_error", None),
        (RequestRefusedError(415, "No.", code="zipped", param="p"), 415, "zipped", "p"),
        (ConfigError("Broken."), 500, "internal_error", None),
    ],
)
def test_each_error_has_its_status(
    error: RvecError, status: int, code: str, param: str | None
) -> None:
    """OpenAI's client raises by the status; programs read the code."""
    response = answer_error(error)
    assert response.status == status
    assert (read_error(response)["code"], read_error(response)["param"]) == (code, param)


def test_a_down_variant_says_why_and_when_to_try_again() -> None:
    """503 with the reason and Retry-After."""
    response = answer_error(VariantDownError("base", "starting"))
    assert read_error(response)["message"] == (
        "The model `base` can't answer now. Why: starting. Try again in a few seconds."
    )
    assert int(response.headers["Retry-After"]) > 0
