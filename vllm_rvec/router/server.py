"""Binding the router's address and serving the application on it."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
import ssl
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.http import HttpProcessingError

from vllm_rvec.errors import ConfigError
from vllm_rvec.router.request import Request

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

    from vllm_rvec.router.app import App
    from vllm_rvec.router.config import Routing, TlsConfig

__all__ = ["Runner", "bind_socket", "check_exposure", "is_loopback", "load_tls", "start_server"]

logger = logging.getLogger("vllm_rvec.router")

BACKLOG = 1024
"""How many connections the kernel keeps for us; aiohttp's 128 is few for a burst of clients."""

SHUTDOWN_SECONDS = 30.0
"""How long requests under way may take to end. Kubernetes kills after 30 s by default."""

FIXES: Mapping[int, tuple[str, str]] = {
    errno.EADDRINUSE: (
        "another process listens there",
        "Stop it, or choose another port; 0 takes any free one.",
    ),
    errno.EADDRNOTAVAIL: (
        "this machine has no such address",
        "Use 127.0.0.1 for this machine only, or 0.0.0.0 for all its addresses.",
    ),
    errno.EACCES: (
        "the system does not allow this port to this user",
        "Choose a port above 1023.",
    ),
}


def bind_socket(host: str, port: int) -> socket.socket:
    """Take the router's address, before the engines take their time to start.

    The socket listens at once. Bound alone it would not hold the port: Linux lets a second
    process bind it too, as long as neither listens. So what connects before `start_server` waits.

    Args:
        host: A name or address of this machine; 0.0.0.0 for all of them.
        port: 0 takes any free one; `getsockname()[1]` tells which.

    Returns:
        The listening socket, for `start_server`.

    Raises:
        ConfigError: If the host is not one, or the port is taken or not allowed.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"{port} is not a port.", fix="Choose one from 0 to 65535.")
    try:
        family, address = _resolve(host, port)
        return socket.create_server(address, family=family, backlog=BACKLOG)
    except socket.gaierror as exc:
        raise ConfigError(
            f"Can't listen on {host!r}.",
            why=f"no address is known for it ({exc.strerror})",
            fix="Give a name or address of this machine, such as 127.0.0.1 or 0.0.0.0.",
        ) from exc
    except OSError as exc:
        why, fix = FIXES.get(exc.errno or 0, (exc.strerror or str(exc), ""))
        raise ConfigError(f"Can't listen on {host} port {port}.", why=why, fix=fix) from exc


class Runner:
    """A server that answers; `start_server` makes it."""

    def __init__(self, server: web.ServerRunner, beside: AsyncExitStack) -> None:
        self._server = server
        self._beside = beside

    async def cleanup(self) -> None:
        """Take no new requests, let those under way end, then end what runs beside them."""
        try:
            await self._server.cleanup()
        finally:
            await self._beside.aclose()


async def start_server(
    app: App,
    listener: socket.socket,
    *,
    shutdown_timeout: float = SHUTDOWN_SECONDS,
    tls: ssl.SSLContext | None = None,
) -> Runner:
    """Serve the application.

    Args:
        app: From `create_app`.
        listener: From `bind_socket`. It is closed with the runner.
        shutdown_timeout: Seconds that `cleanup()` waits for requests under way before it cuts
            them off.
        tls: Has it answer over HTTPS.

    Returns:
        The runner. The caller calls `cleanup()`, and closes its client session after that.
    """
    loop = asyncio.get_running_loop()
    server = web.Server(
        app.handle,  # type: ignore[arg-type]
        request_factory=lambda *parts: Request(*parts, loop),
        # A client that goes away ends the handler, which ends the upstream's generation.
        handler_cancellation=True,
        access_log=None,
        logger=_ProtocolLog(logger),
        auto_decompress=False,
    )
    # aiohttp waits twice: for the handler to end, then again after it has closed the handler's
    # request body, which is read by then.
    runner = web.ServerRunner(server, shutdown_timeout=shutdown_timeout / 2)
    async with AsyncExitStack() as beside:
        await beside.enter_async_context(app.running())
        await runner.setup()
        await web.SockSite(runner, listener, backlog=BACKLOG, ssl_context=tls).start()
        return Runner(runner, beside.pop_all())


def load_tls(config: TlsConfig, context: ssl.SSLContext | None = None) -> ssl.SSLContext:
    """Read a certificate and its key.

    Args:
        config: Their files.
        context: Of a running server, to have new connections use what the files hold now.

    Raises:
        ConfigError: They can't be read, or don't belong together; `context` stays as it was.
    """
    # A failure half-way would leave a context that can't be used, so a running server's is last.
    fresh = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        for loading in (fresh, context or fresh):
            loading.load_cert_chain(config.certificate, config.key, password=_no_password)
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"The certificate {config.certificate} and the key {config.key} can't be used.",
            why=getattr(exc, "strerror", None) or str(exc),
            fix="Give PEM files that belong together, the key without a password.",
        ) from exc
    return context or fresh


def _no_password() -> str:
    msg = "the key has a password, and nobody is there to type it"
    raise ValueError(msg)


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, out of reach for others.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        _, address = _resolve(host, 0)
    except OSError:
        return False
    return ipaddress.ip_address(address[0].partition("%")[0]).is_loopback


def check_exposure(host: str, routing: Routing, *, has_shared_key: bool) -> None:
    """Refuse to answer everybody on a network by accident.

    Args:
        host: Where clients will be answered.
        routing: Which keys are asked for, and whether none is meant.
        has_shared_key: Whether there is a key beside those.

    Raises:
        ConfigError: It is reachable from elsewhere, asks for no key, and nobody said that it may.
    """
    if has_shared_key or routing.keys or routing.insecure:
        return
    if not is_loopback(host):
        raise ConfigError(
            f"Without a key, {host} would let anybody on the network in.",
            fix="Set a key (`api_key`, or `keys` with `vllm-rvec new-key`), or say --insecure.",
        )


class _ProtocolLog(logging.LoggerAdapter[logging.Logger]):
    """aiohttp's own log, without what was wrong in a malformed request: a key may be in it."""

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        if isinstance(kwargs.get("exc_info"), HttpProcessingError):
            kwargs["exc_info"] = None
        return msg, kwargs


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """One address to bind. IPv4 first: `localhost` has both, and older clients try only that."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    return family, (str(address[0]), port)
