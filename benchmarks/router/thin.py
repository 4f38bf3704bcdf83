"""The least that a proxy on aiohttp does: passes requests on, and nothing else.

No policy, keys, metrics, logs or retries. What it takes is what the library takes, so the distance
from it to our router is what all of ours costs. `python -m benchmarks.router.thin UPSTREAM PORT`.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import aiohttp
import uvloop
from aiohttp import web
from yarl import URL

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["main"]

OF_A_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "host", "content-length"}


def _kept(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name.lower() not in OF_A_CONNECTION]


async def _serve(upstream: str, port: int) -> None:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
    ) as client:

        async def pass_on(request: web.BaseRequest) -> web.StreamResponse:
            body = await request.read()
            url = URL(upstream + request.rel_url.raw_path_qs, encoded=True)
            headers = _kept(request.headers.items())
            async with client.request(
                request.method, url, data=body or None, headers=headers
            ) as answer:
                back = _kept(answer.headers.items())
                if answer.content_length is not None:
                    whole = await answer.read()
                    return web.Response(status=answer.status, headers=back, body=whole)
                response = web.StreamResponse(status=answer.status, headers=back)
                await response.prepare(request)
                while chunk := await answer.content.readany():
                    await response.write(chunk)
                return response

        server = web.Server(pass_on, handler_cancellation=True, access_log=None)
        runner = web.ServerRunner(server)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.Event().wait()


def main() -> None:
    """Run until it is killed."""
    upstream, port = sys.argv[1:]
    uvloop.run(_serve(upstream, int(port)))


if __name__ == "__main__":
    main()
