"""`vllm-rvec route`: the router alone, for engines that run elsewhere."""

import asyncio
import json
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_rvec.cli.options import AdminKey, ApiKey, AsJson, Host, Insecure, Port
from vllm_rvec.cli.running import (
    add_aliases,
    address_of,
    log_to,
    run_until_stopped,
    stop_event,
    warn_of_restart,
)
from vllm_rvec.errors import ConfigError
from vllm_rvec.router import (
    Admin,
    RouteConfig,
    Services,
    bind_socket,
    check_exposure,
    create_app,
    create_client,
    load_route_config,
    load_tls,
    start_server,
)
from vllm_rvec.router.reloading import Reloader
from vllm_rvec.router.remote import make_table, update_table, upstreams_of

__all__ = ["route_command"]


def route_command(  # noqa: PLR0917 - typer passes every option by name
    config: Annotated[Path, typer.Option(help="YAML file: variants and where they answer.")],
    host: Host = None,
    port: Port = None,
    api_key: ApiKey = None,
    admin_key: AdminKey = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Offer engines that run elsewhere behind one OpenAI-compatible address.

    The file is read again when it changes, and on SIGHUP: a bad one changes nothing.
    """
    given = {"host": host, "port": port, "insecure": insecure or None}

    bound: list[str] = []  # where it listens, whatever the file says later

    def load() -> RouteConfig:
        loaded = load_route_config(config, given)
        for address in {loaded.host, *bound}:
            check_exposure(address, loaded, has_shared_key=api_key is not None)
        return loaded

    settings = load()
    if api_key is not None and api_key == admin_key:
        raise ConfigError("the admin key is the same as the API key: every client could change all")
    log_to(Console(stderr=True))
    bound.append(settings.host)
    with bind_socket(settings.host, settings.port) as listener:
        router = _Router(config, load, listener, api_key, admin_key)
        run_until_stopped(lambda: router.run(settings, as_json=as_json), is_fast=True)


class _Router:
    """The parts of one `route`."""

    def __init__(
        self,
        path: Path,
        load: Callable[[], RouteConfig],
        listener: socket.socket,
        api_key: str | None,
        admin_key: str | None,
    ) -> None:
        self._path = path
        self._load = load
        self._listener = listener
        self._api_key = api_key
        self._admin_key = admin_key

    async def run(self, settings: RouteConfig, *, as_json: bool) -> None:
        """Route until SIGINT or SIGTERM."""
        tls = None if settings.tls is None else load_tls(settings.tls)
        table = make_table(settings)
        async with AsyncExitStack() as held:
            client = await held.enter_async_context(create_client())
            services = Services.make(table, client, settings, shared_key=self._api_key)
            hashed, drain = settings.admin_key_sha256, settings.drain_seconds
            app = create_app(services, admin=Admin.of(self._admin_key, hashed, None, drain))
            runner = await start_server(app, self._listener, shutdown_timeout=drain, tls=tls)
            held.push_async_callback(runner.cleanup)

            def reload() -> Callable[[], None]:
                changed = self._load()
                # First what may be refused: then nothing has changed.
                upstreams = upstreams_of(changed)
                services.check(changed)
                if changed.tls is not None and tls is not None:
                    load_tls(changed.tls, tls)
                warn_of_restart(settings, changed)

                def swap() -> None:
                    update_table(table, changed, upstreams)
                    services.apply(changed)

                return swap

            reloader = Reloader(self._path, services, reload)
            stop = asyncio.create_task(stop_event().wait())
            self._print_summary(settings, as_json=as_json)
            reloading = asyncio.create_task(reloader.run())
            held.callback(reloading.cancel)
            await asyncio.wait({stop, reloading}, return_when=asyncio.FIRST_COMPLETED)
            if reloading.done():
                reloading.result()

    def _print_summary(self, settings: RouteConfig, *, as_json: bool) -> None:
        port = self._listener.getsockname()[1]
        address = address_of(settings.host, port, is_tls=settings.tls is not None)
        names, aliases = list(settings.variants), list(settings.aliases)
        if as_json:
            said = {"base_url": f"{address}/v1", "models": names, "aliases": aliases}
            typer.echo(json.dumps(said))
            return
        table = Table(show_header=False, title="routing", title_justify="left")
        table.add_row("address", f"{address}/v1")
        for name in names:
            table.add_row("model", Text(name))
        add_aliases(table, settings)
        Console().print(table)
