"""`vllm-rvec serve`, which is `python -m vllm_rvec.serve`: engines and router put together."""

import asyncio
import json
import logging
import shlex
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_rvec.cli.locating import find_vector
from vllm_rvec.cli.options import AdminKey, ApiKey, AsJson, Host, Insecure, Port
from vllm_rvec.cli.progress import show_when_slow
from vllm_rvec.cli.routing import routing_of
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
    Routing,
    Services,
    Upstream,
    VariantFacts,
    VariantTable,
    bind_socket,
    check_exposure,
    create_app,
    create_client,
    load_tls,
    start_server,
)
from vllm_rvec.router.reloading import Reloader
from vllm_rvec.serve import (
    EngineConsole,
    EngineProcess,
    EngineSpec,
    EngineState,
    ModeChoice,
    ServeConfig,
    Supervisor,
    choose_mode,
    load_config,
    model_facts,
    parse_alphas,
    plan_engines,
    variant_name,
    variants_from_alphas,
)
from vllm_rvec.serve.preflight import Preflight, check_files
from vllm_rvec.vector.alpha import AlphaChange
from vllm_rvec.vector.compatibility import Verdict
from vllm_rvec.vector.manifest import Manifest

if TYPE_CHECKING:
    import ssl

__all__ = ["serve_command"]

logger = logging.getLogger(__name__)


def serve_command(  # noqa: PLR0917 - typer passes every option by name
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="The target: a local folder or a Hub id.")
    ] = None,
    vector: Annotated[
        list[str] | None,
        typer.Option(
            help="The stored vector: a local folder, a Hub id\\[@revision] or a URL. Several are "
            "added in their order, each with the variant's alpha."
        ),
    ] = None,
    alpha: Annotated[
        str | None,
        typer.Option(
            help="Alphas to serve, each under a name. 0 is the target unchanged.",
            show_default="0,1",
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="fused starts an engine for each alpha; dial starts one, and each request may "
            "choose its alpha; auto takes the dial for several alphas where it can.",
            show_default="auto",
        ),
    ] = None,
    alpha_range: Annotated[
        str | None,
        typer.Option(help="With a dial: which alphas requests may choose.", show_default="-1:2"),
    ] = None,
    vector_dtype: Annotated[
        str | None,
        typer.Option(
            help="With a dial: how the engine keeps the vector, auto or int8.",
            show_default="auto",
        ),
    ] = None,
    vocab: Annotated[
        str | None,
        typer.Option(
            help="For a target with another number of embedding rows: strict refuses, common adds "
            "the shared rows, skip-embeddings adds none.",
            show_default="strict",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go on where the check of vector and target refuses.")
    ] = False,
    host: Host = None,
    port: Port = None,
    api_key: ApiKey = None,
    admin_key: AdminKey = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with all of this; flags given here win.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option(help="Show every line of the engines, on a terminal too.")
    ] = False,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Serve a target beside itself with a vector added, behind one OpenAI-compatible address.

    What stands after -- goes to vLLM's engines unchanged: `-- --max-model-len 4096`.
    """
    given = {
        "model": model,
        **_vectors(vector or []),
        "variants": None if alpha is None else variants_from_alphas(parse_alphas(alpha)),
        "mode": mode,
        "alpha_range": alpha_range,
        "vector_dtype": vector_dtype,
        "vocabulary": vocab,
        "force": force or None,
        "host": host,
        "port": port,
        "api_key": api_key,
        "admin_key": admin_key,
    }
    settings = written = load_config(config, given)
    words = _engine_arguments(context)
    choice = choose_mode(settings, words)
    routing = routing_of(settings, config, is_dial=choice.mode == "dial", insecure=insecure)
    check_exposure(settings.host, routing, has_shared_key=settings.api_key is not None)
    plan_engines(settings, words, mode=choice.mode)  # what is wrong there costs nothing to say
    settings = settings.found_in([find_vector(vector.path).folder for vector in settings.recipe])
    if choice.mode == "dial":
        choice = choose_mode(settings, words, model_facts(settings))
        routing = routing_of(settings, config, is_dial=choice.mode == "dial", insecure=insecure)
    with show_when_slow("verifying the vector") as on_progress:
        found = check_files(settings, choice.mode, on_progress=on_progress)
    specs = plan_engines(settings, words, mode=choice.mode)
    stderr = Console(stderr=True)
    log_to(stderr)
    _log_findings(found)
    logger.info("mode %s: %s", choice.mode, choice.reason)
    # The port is held from here on: half a minute of engines must not end in "port in use".
    with bind_socket(settings.host, settings.port) as listener:
        console = EngineConsole(stderr, verbose=verbose)
        server = _Server(
            settings,
            choice,
            routing,
            specs,
            listener=listener,
            console=console,
            fingerprint=_fingerprint(settings),
        )
        if config is not None:
            server.follow(config, written, lambda: load_config(config, given), insecure=insecure)
        run_until_stopped(lambda: server.run(as_json=as_json))


def _vectors(given: list[str]) -> dict[str, object]:
    """Put several vectors down as a recipe of whole ones."""
    if len(given) > 1:
        return {"vectors": [{"path": path} for path in given]}
    return {"vector": given[0]} if given else {}


def _log_findings(found: Preflight) -> None:
    for report in found.reports:
        for line in report.lines(Verdict.WARN):
            logger.warning("vector and target: %s", line)
        for line in report.lines(Verdict.REFUSE):
            logger.warning("vector and target, refused but forced: %s", line)


def _engine_arguments(context: typer.Context) -> list[str]:
    return list(context.args)


class _Server:
    """The parts of one `serve`, from the first engine's start to the last one's end."""

    def __init__(
        self,
        settings: ServeConfig,
        choice: ModeChoice,
        routing: Routing,
        specs: Sequence[EngineSpec],
        *,
        listener: socket.socket,
        console: EngineConsole,
        fingerprint: str | None = None,
    ) -> None:
        self._settings = settings
        self._routing = routing
        self._specs = specs
        self._listener = listener
        self._console = console
        self._mode = choice.mode
        dial = settings.dial if choice.mode == "dial" else None
        self._variants = VariantTable([v.name for spec in specs for v in spec.variants], dial)
        self._supervisor = Supervisor(specs, self._launch, self._on_state)
        self._services: Services | None = None
        self._tls: ssl.SSLContext | None = None
        self._fingerprint = fingerprint
        self._reload: tuple[Path, Callable[[], Callable[[], None]]] | None = None

    def follow(
        self, path: Path, written: ServeConfig, load: Callable[[], ServeConfig], *, insecure: bool
    ) -> None:
        """Take in what changes under `routing` while it runs.

        Args:
            path: The configuration's file.
            written: As it was read at the start.
            load: Reads it again.
            insecure: `--insecure` of the command line.
        """

        def read() -> Callable[[], None]:
            changed = load()
            routing = self._changed_routing(changed, path, insecure=insecure)
            if changed.model_dump(exclude={"routing"}) != written.model_dump(exclude={"routing"}):
                logger.warning("only what stands under `routing` is read again; restart for more")
            return lambda: self._services.apply(routing) if self._services else None

        self._reload = (path, read)

    def _changed_routing(self, changed: ServeConfig, path: Path, *, insecure: bool) -> Routing:
        # Checked against the variants that run, not against those that the file names by now.
        running = self._settings.model_copy(update={"routing": changed.routing})
        is_dial = self._mode == "dial"
        routing = routing_of(running, path, is_dial=is_dial, insecure=insecure)
        if new := sorted({*routing.aliases} - {*self._routing.aliases}):
            _check_new_aliases(new, is_dial=is_dial)
        if self._services is not None:
            self._services.check(routing)
        has_key = self._settings.api_key is not None
        check_exposure(self._settings.host, routing, has_shared_key=has_key)
        if routing.tls is not None and self._tls is not None:
            load_tls(routing.tls, self._tls)  # last: what is refused changes nothing
        warn_of_restart(self._routing, routing)
        return routing

    async def run(self, *, as_json: bool) -> None:
        """Serve until SIGINT or SIGTERM; a second one does not wait for requests.

        Raises:
            EngineStartupError: An engine did not start; no process is left.
        """
        key = self._settings.api_key
        if self._routing.tls is not None:
            self._tls = load_tls(self._routing.tls)
        async with create_client() as client:
            services = self._services = Services.make(
                self._variants,
                client,
                self._routing,
                shared_key=key.get_secret_value() if key else None,
            )
            runner = await start_server(
                create_app(services, admin=self._admin()),
                self._listener,
                shutdown_timeout=self._settings.drain_seconds,
                tls=self._tls,
            )
            work = asyncio.create_task(self._start_and_watch(as_json=as_json))
            reloading = asyncio.create_task(self._follow_changes(services))
            stop = asyncio.create_task(stop_event().wait())
            try:
                await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                reloading.cancel()
                # Requests first, then engines: the router lets go of what is in flight.
                try:
                    await runner.cleanup()
                finally:
                    await self._supervisor.stop(0)
            if not work.cancelled():
                await work

    async def _follow_changes(self, services: Services) -> None:
        if self._reload is None:
            return
        path, read = self._reload
        await Reloader(path, services, read).run()

    async def _start_and_watch(self, *, as_json: bool) -> None:
        with self._console:
            is_started = await self._supervisor.start()
        if is_started:
            self._print_summary(as_json=as_json)
            await self._supervisor.run()

    def _launch(self, spec: EngineSpec) -> EngineProcess:
        return EngineProcess(spec, self._console.on_line)

    def _on_state(
        self, spec: EngineSpec, state: EngineState, detail: str, engine: EngineProcess | None
    ) -> None:
        for variant in spec.variants:
            self._describe(variant.name, variant.alpha)
            if state is EngineState.READY and engine is not None:
                upstream = Upstream(engine.base_url, engine.api_key)
                self._variants.set_ready(variant.name, upstream)
            else:
                self._variants.set_down(variant.name, detail or state.value)
        self._console.on_state(spec, state, detail, engine)

    def _admin(self) -> Admin | None:
        key = self._settings.admin_key
        return Admin.of(
            key.get_secret_value() if key else None,
            self._routing.admin_key_sha256,
            self._change_alpha,
            self._settings.drain_seconds,
        )

    async def _change_alpha(self, name: str, alpha: float) -> AlphaChange:
        """Change a fused engine; the router turns a dial by itself."""
        done = await self._supervisor.change_alpha(name, alpha)  # an engine has its variant's name
        self._describe(name, alpha)
        if (name == "base" or name.startswith("enhanced@")) and name != variant_name(alpha):
            logger.warning("%s is no longer what its name says: its alpha is %s", name, alpha)
        return done

    def _describe(self, name: str, alpha: float | Mapping[str, float]) -> None:
        paths = " + ".join(vector.path for vector in self._settings.recipe)
        self._variants.describe(name, VariantFacts(alpha, paths, fingerprint=self._fingerprint))

    def _print_summary(self, *, as_json: bool) -> None:
        address, names = self._address(), list(self._variants.names())
        if as_json:
            typer.echo(json.dumps(self._as_json(address, names)))
            return
        table = Table(show_header=False, title="ready", title_justify="left")
        table.add_row("address", f"{address}/v1")
        for spec in self._specs:
            for variant in spec.variants:
                table.add_row("model", Text(f"{variant.name}  (alpha {variant.alpha_text})"))
        add_aliases(table, self._routing)
        if (allowed := self._variants.alpha_range) is not None:
            table.add_row("model", f"any alpha in {allowed}: enhanced@A")
        Console().print(table)
        # Outside the table, on one line: made to be pasted.
        typer.echo(self._curl(address, names[-1]))

    def _as_json(self, address: str, names: list[str]) -> dict[str, object]:
        allowed = self._variants.alpha_range
        return {
            "base_url": f"{address}/v1",
            "models": names,
            "aliases": list(self._routing.aliases),
            "mode": self._mode,
            "alpha_range": None if allowed is None else list(allowed),
        }

    def _address(self) -> str:
        port = self._listener.getsockname()[1]
        return address_of(self._settings.host, port, is_tls=self._routing.tls is not None)

    def _curl(self, address: str, name: str) -> str:
        key = ' -H "Authorization: Bearer $VLLM_RVEC_API_KEY"' if self._settings.api_key else ""
        messages = [{"role": "user", "content": self._settings.example}]
        body = json.dumps({"model": name, "messages": messages})
        return (
            f"curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} "
            f"-d {shlex.quote(body)}"
        )


def _fingerprint(settings: ServeConfig) -> str:
    """Which weights are added: the digests of the vectors' manifests, in their order."""
    digests = [Manifest.read(Path(vector.path)).digest for vector in settings.recipe]
    return "+".join(f"blake3:{digest}" for digest in digests)


def _check_new_aliases(new: Sequence[str], *, is_dial: bool) -> None:
    """An alias is among the names that a fused engine was started with, or it is not answered."""
    if not is_dial:
        raise ConfigError(
            f"the aliases {', '.join(new)} are new",
            why="engines learn the names that they answer to when they start",
            fix="restart `vllm-rvec serve`, or use a dial, which takes any",
        )
