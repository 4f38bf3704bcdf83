"""The engine that a sweep starts for itself: behind a router of its own, out of others' reach.

The router gives it one address over restarts, and says in each answer which alpha was used.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from vllm_rvec.cli.running import address_of
from vllm_rvec.errors import AlphaChangeFailedError, EngineStartupError
from vllm_rvec.router import (
    Services,
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
    ServeConfig,
    Supervisor,
    plan_engines,
)
from vllm_rvec.serve.flags import as_arguments
from vllm_rvec.serve.mode import Mode
from vllm_rvec.vector.alpha import alpha_text

__all__ = ["OwnEngine", "engine_running"]

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
QUIET = "disable-uvicorn-access-log"

STARTS_IN_A_ROW = 4
"""After so many failed restarts of an engine that was ready once, it won't come back."""

CHANGES_IN_A_ROW = 3
"""How often a change of alpha that broke off is tried."""


class OwnEngine:
    """One engine, and where it is asked.

    Args:
        settings: Its target and vectors; one variant where they are fused.
        mode: Dial or fused.
        words: More flags of vLLM.
        console: Is shown its lines and states.
    """

    def __init__(
        self,
        settings: ServeConfig,
        mode: Mode,
        words: tuple[str, ...],
        console: EngineConsole,
    ) -> None:
        (self._spec,) = plan_engines(settings, (*words, *_quiet(settings, words)), mode=mode)
        dial = settings.dial if mode == "dial" else None
        self.variants = VariantTable([one.name for one in self._spec.variants], dial)
        self.supervisor = Supervisor([self._spec], self._launch, self._on_state)
        self.key = secrets.token_urlsafe(32)
        self.base_url = ""
        self._vector = " + ".join(vector.path for vector in settings.recipe)
        self._console = console
        self._ready = asyncio.Event()
        self._failed_starts = 0
        self._trouble = ""

    async def until_ready(self) -> None:
        """Wait for an engine that is starting again.

        Raises:
            EngineStartupError: It does not come back.
        """
        await self._ready.wait()
        if self._failed_starts >= STARTS_IN_A_ROW:
            raise EngineStartupError(
                "the engine ended, and did not start again",
                why=self._trouble,
                fix="run the same command again: it goes on where this one stopped",
            )

    async def turn_to(self, alpha: float) -> None:
        """Bring a fused engine to an alpha.

        Raises:
            AlphaChangeError: It can't be.
        """
        (variant,) = self.variants.names()
        facts = self.variants.facts(variant)
        if facts is not None and facts.alpha == alpha:
            return
        for tries in range(1, CHANGES_IN_A_ROW + 1):
            await self.until_ready()
            try:
                await self.supervisor.change_alpha(self._spec.name, alpha)
                break
            except AlphaChangeFailedError as exc:
                if tries == CHANGES_IN_A_ROW:
                    raise
                logger.warning("alpha %s: %s; trying again", alpha_text(alpha), exc.what)
                self._ready.clear()
        self.variants.describe(variant, VariantFacts(alpha, self._vector))

    def describe(self) -> None:
        """Have each answer say its alpha."""
        for variant in self._spec.variants:
            self.variants.describe(variant.name, VariantFacts(variant.alpha, self._vector))

    def _launch(self, spec: EngineSpec) -> EngineProcess:
        return EngineProcess(spec, self._console.on_line)

    def _on_state(
        self, spec: EngineSpec, state: EngineState, detail: str, engine: EngineProcess | None
    ) -> None:
        for name in self.variants.names():
            if state is EngineState.READY and engine is not None:
                self.variants.set_ready(name, Upstream(engine.base_url, engine.api_key))
            else:
                self.variants.set_down(name, detail or state.value)
        self._console.on_state(spec, state, detail, engine)
        self._note(state, detail)

    def _note(self, state: EngineState, detail: str) -> None:
        if state is EngineState.READY:
            self._failed_starts = 0
            self._ready.set()
        elif state is EngineState.DOWN:
            self._failed_starts += 1
            self._trouble = detail
            if self._failed_starts < STARTS_IN_A_ROW:
                self._ready.clear()
            else:
                self._ready.set()  # whoever waits is told


def _quiet(settings: ServeConfig, words: tuple[str, ...]) -> tuple[str, ...]:
    """Keep vLLM from a line of log for each request, unless something was said about that."""
    given = [*as_arguments(settings.engine_flags), *words]
    return () if any(QUIET in word for word in given) else (f"--{QUIET}",)


@asynccontextmanager
async def engine_running(
    settings: ServeConfig, mode: Mode, words: tuple[str, ...], console: EngineConsole
) -> AsyncIterator[OwnEngine]:
    """Start an engine, and end it with the block, whatever way that ends.

    Raises:
        EngineStartupError: It did not start; no process is left.
    """
    engine = OwnEngine(settings, mode, words, console)
    engine.describe()
    with bind_socket(LOOPBACK, 0) as listener:
        engine.base_url = address_of(LOOPBACK, listener.getsockname()[1])
        async with create_client() as client:
            services = Services.make(engine.variants, client, shared_key=engine.key)
            runner = await start_server(create_app(services), listener, shutdown_timeout=0)
            watching: asyncio.Task[None] | None = None
            try:
                with console:
                    await engine.supervisor.start()
                watching = asyncio.create_task(engine.supervisor.run())
                yield engine
            finally:
                if watching is not None:
                    watching.cancel()
                try:
                    await runner.cleanup()
                finally:
                    await engine.supervisor.stop(0)
