"""HTTP/1.1, as far as the load generator and the stand-in engine need it of each other.

Both must cost far less than what stands between them. So requests are bytes made once, and the
parts of a message are looked for, not parsed. Neither is fit for anything else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = [
    "CONTENT",
    "HEAD_END",
    "body_length",
    "chat_request",
    "chunk",
    "is_whole_chunked",
    "joined",
]

HEAD_END = b"\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"

CONTENT = b" tok"
"""What each event of a stream has once, however a proxy writes the rest of it again."""

LENGTH = re.compile(rb"(?i)\r\ncontent-length:[ \t]*(\d+)")


@dataclass(frozen=True, slots=True)
class _Chunk:
    begin: int
    end: int
    following: int


def body_length(head: bytes) -> int | None:
    """The promised length of a body; None where there is no such promise.

    Args:
        head: Of a request or an answer.
    """
    found = LENGTH.search(head)
    return int(found[1]) if found else None


def chat_request(host: str, *, chunks: int = 0, pause_ms: int = 0) -> bytes:
    """A chat completion to ask for.

    Args:
        host: Of the server, with its port.
        chunks: Of the stream to answer with; 0 for an answer in one piece.
        pause_ms: Before each chunk.

    Returns:
        The whole request. The stand-in engine reads what it shall do from the message's text, which
        no proxy changes.
    """
    text = f"{chunks} chunks, {pause_ms} ms apart"
    stream = b'"stream":true,' if chunks else b""
    body = b'{"model":"base",%b"max_tokens":64,"messages":[{"role":"user","content":"%b"}]}' % (
        stream,
        text.encode(),
    )
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAccept: */*\r\n"
        "Authorization: Bearer none\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def chunk(data: bytes) -> bytes:
    r"""One chunk of a chunked body.

    >>> chunk(b"data")
    b'4\r\ndata\r\n'
    """
    return b"%x\r\n%b\r\n" % (len(data), data)


def is_whole_chunked(body: bytes | bytearray) -> bool:
    """Whether a chunked body has ended. No stand-in's answer ends so in the middle.

    Args:
        body: As it came.
    """
    return body.endswith(LAST_CHUNK) and (len(body) == len(LAST_CHUNK) or body[-7:-5] == b"\r\n")


def joined(body: bytes | bytearray) -> bytes:
    r"""The data of a whole chunked body.

    >>> joined(b"2\r\nda\r\n2\r\nta\r\n0\r\n\r\n")
    b'data'

    Args:
        body: As it came.

    Raises:
        ValueError: It is not made of chunks.
    """
    pieces, at = [], 0
    while (found := _chunk_at(body, at)).end > found.begin:
        pieces.append(body[found.begin : found.end])
        at = found.following
    return b"".join(pieces)


def _chunk_at(body: bytes | bytearray, at: int) -> _Chunk:
    line_end = body.index(b"\r\n", at)
    begin = line_end + 2
    end = begin + int(body[at:line_end].partition(b";")[0], 16)
    return _Chunk(begin, end, end + 2)
