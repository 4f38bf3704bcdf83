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

from vllm_rvec.cli.running import (
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
    hash_key,
    load_route_config,
    load_tls,
    start_server,
)
from vllm_rvec.router.reloading import Reloader
from vllm_rvec.router.remote import make_table, update_table, upstreams_of

__all__ = ["route_command"]


def route_command(  # noqa: PLR0917 - typer passes every option by name
    config: Annotated[Path, typer.Option(help="YAML file: variants and where they answer.")],
    host: Annotated[
        str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; 0 takes a free one.", show_default="8000")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="VLLM_RVEC_API_KEY",
            show_envvar=True,
            help="One key for all clients. Better in the environment: others see this line.",
        ),
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(
            envvar="VLLM_RVEC_ADMIN_KEY",
            show_envvar=True,
            help="Key for changing weights and alphas; without one, nobody can.",
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Answer beyond this machine without any key.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print address and names as JSON once it answers.")
    ] = False,
) -> None:
    """Offer engines that run elsewhere behind one OpenAI-compatible address.

    The file is read again when it changes, and on SIGHUP: a bad one changes nothing.
    """
    given = {"host": host, "port": port, "insecure": insecure or None}

    bound: list[str] = []  # where it listens, whatever the file says later

    def load() -> RouteConfig:
        loaded = load_route_config(config, given)
        is_open = api_key is None and not loaded.keys
        for address in {loaded.host, *bound}:
            check_exposure(address, is_open=is_open, is_insecure=loaded.insecure)
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
            app = create_app(services, admin=self._admin(settings))
            runner = await start_server(
                app, self._listener, shutdown_timeout=settings.drain_seconds, tls=tls
            )
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

    def _admin(self, settings: RouteConfig) -> Admin | None:
        sha256 = settings.admin_key_sha256
        if self._admin_key is not None:
            sha256 = hash_key(self._admin_key)
        return None if sha256 is None else Admin.of_hash(sha256, None, settings.drain_seconds)

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
        for name, alias in settings.aliases.items():
            split = ", ".join(f"{variant}: {weight:g}" for variant, weight in alias.split.items())
            table.add_row("alias", Text(f"{name}  ({split})"))
        Console().print(table)
