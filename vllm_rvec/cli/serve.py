"""`vllm-rvec serve`, which is `python -m vllm_rvec.serve`: engines and router put together."""

import asyncio
import json
import logging
import shlex
import signal
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from vllm_rvec.cli.locating import find_vector
from vllm_rvec.cli.progress import show_when_slow
from vllm_rvec.router import (
    Admin,
    Upstream,
    VariantFacts,
    VariantTable,
    bind_socket,
    create_app,
    create_client,
    start_server,
)
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
            help="Key that clients must send. Better in the environment: others see this line.",
        ),
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(
            envvar="VLLM_RVEC_ADMIN_KEY",
            show_envvar=True,
            help="Key for changing a variant's alpha while it serves; without one, nobody can.",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with all of this; flags given here win.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option(help="Show every line of the engines, on a terminal too.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print address and names as JSON once all is ready.")
    ] = False,
) -> None:
    """Serve a target beside itself with a vector added, behind one OpenAI-compatible address.

    What stands after -- goes to vLLM's engines unchanged: `-- --max-model-len 4096`.
    """
    settings = load_config(
        config,
        {
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
        },
    )
    words = _engine_arguments(context)
    choice = choose_mode(settings, words)
    plan_engines(settings, words, mode=choice.mode)  # what is wrong there costs nothing to say
    settings = settings.found_in([find_vector(vector.path).folder for vector in settings.recipe])
    if choice.mode == "dial":
        choice = choose_mode(settings, words, model_facts(settings))
    with show_when_slow("verifying the vector") as on_progress:
        found = check_files(settings, choice.mode, on_progress=on_progress)
    specs = plan_engines(settings, words, mode=choice.mode)
    stderr = Console(stderr=True)
    _log_to(stderr)
    _log_findings(found)
    logger.info("mode %s: %s", choice.mode, choice.reason)
    # The port is held from here on: half a minute of engines must not end in "port in use".
    with bind_socket(settings.host, settings.port) as listener:
        console = EngineConsole(stderr, verbose=verbose)
        server = _Server(settings, choice, specs, listener, console)
        with suppress(asyncio.CancelledError):  # a second Ctrl-C: stop without waiting
            asyncio.run(server.run(as_json=as_json))


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
        specs: Sequence[EngineSpec],
        listener: socket.socket,
        console: EngineConsole,
    ) -> None:
        self._settings = settings
        self._specs = specs
        self._listener = listener
        self._console = console
        self._mode = choice.mode
        dial = settings.dial if choice.mode == "dial" else None
        self._variants = VariantTable([v.name for spec in specs for v in spec.variants], dial)
        self._supervisor = Supervisor(specs, self._launch, self._on_state)

    async def run(self, *, as_json: bool) -> None:
        """Serve until SIGINT or SIGTERM; a second one does not wait for requests.

        Raises:
            EngineStartupError: An engine did not start; no process is left.
        """
        key = self._settings.api_key
        async with create_client() as client:
            app = create_app(
                self._variants,
                client,
                api_key=key.get_secret_value() if key else None,
                admin=self._admin(),
            )
            runner = await start_server(
                app, self._listener, shutdown_timeout=self._settings.drain_seconds
            )
            work = asyncio.create_task(self._start_and_watch(as_json=as_json))
            stop = self._stop_event()
            try:
                await asyncio.wait(
                    {work, asyncio.create_task(stop.wait())}, return_when=asyncio.FIRST_COMPLETED
                )
            finally:
                # Requests first, then engines: the router lets go of what is in flight.
                try:
                    await runner.cleanup()
                finally:
                    await self._supervisor.stop(0)
            if not work.cancelled():
                await work

    def _stop_event(self) -> asyncio.Event:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        main = asyncio.current_task()

        def on_signal() -> None:
            if stop.is_set() and main is not None:
                main.cancel()
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        return stop

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
        if (key := self._settings.admin_key) is None:
            return None
        return Admin(key.get_secret_value(), self._change_alpha, self._settings.drain_seconds)

    async def _change_alpha(self, name: str, alpha: float) -> AlphaChange:
        """Change a fused engine; the router turns a dial by itself."""
        done = await self._supervisor.change_alpha(name, alpha)  # an engine has its variant's name
        self._describe(name, alpha)
        if (name == "base" or name.startswith("enhanced@")) and name != variant_name(alpha):
            logger.warning("%s is no longer what its name says: its alpha is %s", name, alpha)
        return done

    def _describe(self, name: str, alpha: float | Mapping[str, float]) -> None:
        paths = " + ".join(vector.path for vector in self._settings.recipe)
        self._variants.describe(name, VariantFacts(alpha, paths))

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
            "mode": self._mode,
            "alpha_range": None if allowed is None else list(allowed),
        }

    def _address(self) -> str:
        port = self._listener.getsockname()[1]
        host = self._settings.host
        host = "127.0.0.1" if host in {"0.0.0.0", "::"} else host
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def _curl(self, address: str, name: str) -> str:
        key = ' -H "Authorization: Bearer $VLLM_RVEC_API_KEY"' if self._settings.api_key else ""
        messages = [{"role": "user", "content": self._settings.example}]
        body = json.dumps({"model": name, "messages": messages})
        return (
            f"curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} "
            f"-d {shlex.quote(body)}"
        )


def _log_to(console: Console) -> None:
    """Send our own log to stderr, one line per event, around a live display if there is one."""
    handler: logging.Handler = (
        RichHandler(console=console, show_path=False, markup=False, highlighter=None)
        if console.is_terminal
        else logging.StreamHandler()
    )
    if not console.is_terminal:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger = logging.getLogger("vllm_rvec")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
