"""Which engine has a stored response of `/v1/responses`.

vLLM keeps responses in the memory of the engine that made them (with
VLLM_ENABLE_RESPONSES_API_STORE=1). So whoever asks for one, cancels it or goes on from it must come
to the same engine. What is known here is known to this router process only, and is gone when it
ends; engines lose theirs when they end, too.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pydantic_core import from_json

if TYPE_CHECKING:
    from pydantic import JsonValue

__all__ = ["FIRST_BYTES", "SAFE_ID", "Owner", "ResponseOwners", "response_id_of"]

FIRST_BYTES: Final = 16_384
"""How far `response_id_of` looks. vLLM's `id` is within the first 70 bytes."""

SAFE_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,199}")
"""The ids that are kept. vLLM makes `resp_` and hexadecimal digits, but a client may choose
another, as `request_id`: it becomes a part of paths, and must be able to be nothing else there."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Who has a response."""

    variant: str
    """The variant that answered."""
    base_url: str
    """The engine of it that did."""


class ResponseOwners:
    """Who has which response; the one not asked for longest is forgotten first.

    Args:
        max_entries: How many are kept.
    """

    def __init__(self, max_entries: int = 100_000) -> None:
        self._max_entries = max_entries
        self._owners: OrderedDict[str, Owner] = OrderedDict()

    def __len__(self) -> int:
        return len(self._owners)

    def note(self, response_id: str, variant: str, base_url: str) -> None:
        """Remember who made a response; the last word counts.

        Args:
            response_id: As `response_id_of` found it.
            variant: Who answered.
            base_url: Of the engine that did.
        """
        self._owners[response_id] = Owner(variant, base_url)
        self._owners.move_to_end(response_id)
        while len(self._owners) > self._max_entries:
            self._owners.popitem(last=False)

    def find(self, response_id: str) -> Owner | None:
        """Who has a response; None if that is not known, or no longer."""
        owner = self._owners.get(response_id)
        if owner is not None:
            self._owners.move_to_end(response_id)
        return owner


def response_id_of(chunk: bytes) -> str | None:
    r"""Find the id of a response in the beginning of an answer.

    Args:
        chunk: The first bytes of a 200 from `/v1/responses`: of a JSON body, or of a stream up to
            the end of its first event at least. What is beyond `FIRST_BYTES` is not looked at.

    Returns:
        The id; None where there is none, or not all of it yet.

    >>> response_id_of(b'{"id":"resp_1","created_at":17')
    'resp_1'
    >>> response_id_of(b'event: response.created\ndata: {"response":{"id":"resp_2","crea')
    'resp_2'
    """
    beginning = chunk[:FIRST_BYTES].lstrip()
    if beginning.startswith(b"{"):
        return _id_in(_parse(beginning))
    event = _parse(_data_of_first_event(beginning))
    return _id_in(event.get("response")) if isinstance(event, dict) else None


def _id_in(response: JsonValue) -> str | None:
    found = response.get("id") if isinstance(response, dict) else None
    return found if isinstance(found, str) and SAFE_ID.fullmatch(found) else None


def _parse(text: bytes) -> JsonValue:
    """What can be read of a JSON text that may be cut off; half a string doesn't count."""
    try:
        parsed: JsonValue = from_json(text, allow_partial=True, cache_strings="none")
    except ValueError:
        return None
    return parsed


def _data_of_first_event(stream: bytes) -> bytes:
    """What stands behind `data:` in the first event that has data; comments may come before."""
    data: list[bytes] = []
    for line in stream.splitlines():
        if line.startswith(b"data:"):
            data.append(line[len(b"data:") :])
        elif not line and data:
            break
    return b"\n".join(data)
