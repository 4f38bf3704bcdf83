"""Keeps the engines running: starts them in turn, brings back those that end, stops them all.

Not here: one engine's processes (`engine`, `guard`), and who is told about states (the caller).
"""

from __future__ import annotations

import asyncio
import enum
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_rvec.errors import (
    AlphaChangeFailedError,
    AlphaChangeRefusedError,
    EngineStartupError,
)
from vllm_rvec.serve.engine import EngineProcess, describe_exit
from vllm_rvec.serve.live import ask_for_alpha

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from vllm_rvec.serve.plan import EngineSpec
    from vllm_rvec.vector.alpha import AlphaChange

    Launch = Callable[[EngineSpec], EngineProcess]
    OnState = Callable[[EngineSpec, "EngineState", str, EngineProcess | None], None]

__all__ = ["EngineState", "Pace", "Supervisor"]


class EngineState(enum.StrEnum):
    """Where an engine stands."""

    STARTING = "starting"
    READY = "ready"
    DOWN = "down"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Pace:
    """How long the supervisor waits for what.

    Attributes:
        first_delay_seconds: From an engine's end to its restart.
        longest_delay_seconds: Each further attempt doubles the delay, up to here.
        healthy_seconds: An engine that was ready for so long starts again with the first delay.
        teardown_seconds: What an engine gets to end, on top of the time for its requests.
        least_change_seconds: What an engine gets at least for a change of alpha.
        start_factor: It gets so many times the time of its start, if that is longer.
    """

    first_delay_seconds: float = 1.0
    longest_delay_seconds: float = 30.0
    healthy_seconds: float = 60.0
    teardown_seconds: float = 15.0
    least_change_seconds: float = 60.0
    start_factor: float = 2.0


class Supervisor:
    """Starts, watches and stops engines.

    `start()`, then `run()`, then `stop()`. Whatever way these end, no engine's process is left:
    cancelling `start()` or `run()` kills the engines, so call `stop()` to let requests finish.

    Args:
        specs: The engines, in the order in which they start.
        launch: Makes an `EngineProcess` that is not started; called for each start.
        on_state: Called on every change with the engine's spec, its state, a detail for people
            (empty where there is none), and its process.
        startup_timeout_seconds: When to give up on an engine that starts; never when None.
        pace: How long to wait for what.
        sleep: Waits between restarts; a seam for tests.
        clock: Seconds that only grow; a seam for tests.
    """

    def __init__(
        self,
        specs: Sequence[EngineSpec],
        launch: Launch,
        on_state: OnState,
        *,
        startup_timeout_seconds: float | None = None,
        pace: Pace = Pace(),
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._launch = launch
        self._on_state = on_state
        self._startup_timeout_seconds = startup_timeout_seconds
        self._pace = pace
        self._sleep = sleep
        self._clock = clock
        self._engines: dict[str, EngineProcess] = {}
        self._ready: set[str] = set()
        self._start_seconds: dict[str, float] = {}
        self._changing: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watchers: list[asyncio.Task[None]] = []
        self._all_ready = asyncio.Event()
        # One at a time, restarts too: a start-up takes all of a machine, and vLLM measures the
        # memory that is free while it starts.
        self._start_turn = asyncio.Lock()
        self._stopping: asyncio.Task[None] | None = None

    async def start(self) -> bool:
        """Start the engines one after the other, and watch each from the moment it is ready.

        One that ends while a later one starts is restarted in its turn, as it is afterwards.

        Returns:
            True when all are ready; False when `stop()` was called meanwhile.

        Raises:
            EngineStartupError: An engine ended before it was ready. It would do so again, so it is
                not restarted, and the others are stopped.
        """
        if self._stopping is not None:
            return False
        # A task of its own, which stop() can cancel without cancelling our caller.
        startup = self._spawn(self._start_all())
        try:
            await asyncio.wait({startup})
            if not startup.cancelled():
                startup.result()
        except BaseException:
            await self._abort()
            raise
        return self._stopping is None

    async def run(self) -> None:
        """Go on watching and restarting; returns once `stop()` has been called."""
        if self._stopping is None:
            try:
                await asyncio.wait(self._watchers, return_when=asyncio.FIRST_EXCEPTION)
                for watcher in self._watchers:
                    if watcher.done() and not watcher.cancelled():
                        watcher.result()
            except BaseException:
                await self._abort()
                raise
        if self._stopping is not None:
            await asyncio.shield(self._stopping)

    async def stop(self, drain_seconds: float) -> None:
        """Stop all engines at once; further calls wait for the first.

        Args:
            drain_seconds: How long requests in flight may go on; with 0, engines are killed, which
                takes 4 s at most (vLLM's own teardown takes longer). Cancelling this call cuts it
                short.
        """
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop_all(drain_seconds))
        try:
            await asyncio.shield(self._stopping)
        except asyncio.CancelledError:
            self._kill_all()
            raise

    async def change_alpha(self, name: str, alpha: float) -> AlphaChange:
        """Have a ready engine serve another alpha; from then on it also starts at that one.

        Args:
            name: The engine. No request of it may be under way.
            alpha: The new one.

        Returns:
            What was done.

        Raises:
            AlphaChangeRefusedError: Nothing was changed.
            AlphaChangeFailedError: The engine is being killed, since its weights may be a mixture;
                it starts again at its old alpha.
        """
        if name not in self._ready or name in self._changing or self._stopping is not None:
            why = "a change is under way" if name in self._changing else "it is not ready"
            raise AlphaChangeRefusedError(f"alpha of engine {name!r} can't be changed now", why=why)
        engine = self._engines[name]
        limit = max(
            self._pace.least_change_seconds, self._pace.start_factor * self._start_seconds[name]
        )
        self._changing.add(name)
        try:
            change = await ask_for_alpha(engine, alpha, timeout_seconds=limit)
            if self._engines[name] is not engine:
                raise AlphaChangeFailedError("the engine ended, and was started at its old alpha")  # noqa: TRY301
        except AlphaChangeRefusedError:
            raise
        except BaseException as exc:
            self._give_up_on(name, engine, exc)
            raise
        finally:
            self._changing.discard(name)
        self._specs[name] = self._specs[name].with_alpha(alpha)
        return change

    def _give_up_on(self, name: str, engine: EngineProcess, reason: BaseException) -> None:
        """End an engine that may serve a mixture; `_keep_alive` starts it again."""
        engine.kill()
        if self._engines[name] is not engine or self._stopping is not None:
            return
        self._ready.discard(name)
        self._all_ready.clear()
        detail = "a change of alpha was broken off"
        if isinstance(reason, AlphaChangeFailedError):
            detail = f"{reason.what}: {reason.why}"
        self._on_state(self._specs[name], EngineState.DOWN, detail, engine)

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _start_all(self) -> None:
        for name in self._specs:
            await self._bring_up(name)
            self._watchers.append(self._spawn(self._keep_alive(name)))
        await self._all_ready.wait()

    async def _bring_up(self, name: str) -> None:
        async with self._start_turn:
            spec = self._specs[name]
            started_at = self._clock()
            engine = self._launch(spec)
            self._engines[name] = engine
            self._on_state(spec, EngineState.STARTING, "", engine)
            try:
                await engine.start()
                await engine.wait_until_ready(self._startup_timeout_seconds)
            except BaseException:
                engine.kill()
                raise
        self._start_seconds[name] = self._clock() - started_at
        self._ready.add(name)
        if len(self._ready) == len(self._specs):
            self._all_ready.set()
        self._on_state(spec, EngineState.READY, "", engine)

    async def _keep_alive(self, name: str) -> None:
        delay = self._pace.first_delay_seconds
        while True:
            ready_at = self._clock()
            engine = self._engines[name]
            detail = f"ended with {describe_exit(await engine.wait())}"
            self._ready.discard(name)
            self._all_ready.clear()
            if self._clock() - ready_at >= self._pace.healthy_seconds:
                delay = self._pace.first_delay_seconds
            delay = await self._bring_back(name, detail, delay)

    async def _bring_back(self, name: str, detail: str, delay: float) -> float:
        """Restart an engine until it is ready; returns the delay that comes next."""
        while True:
            detail = f"{detail}; starts again in {delay:g} s"
            self._on_state(self._specs[name], EngineState.DOWN, detail, self._engines[name])
            await self._sleep(delay)
            delay = min(2 * delay, self._pace.longest_delay_seconds)
            try:
                await self._bring_up(name)
            except EngineStartupError as exc:
                detail = exc.what if not exc.why else f"{exc.what}: {exc.why.splitlines()[0]}"
            else:
                return delay

    async def _stop_all(self, drain_seconds: float) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for spec in self._specs.values():
            if (engine := self._engines.get(spec.name)) is None:
                continue
            self._on_state(spec, EngineState.STOPPING, "", engine)
            if drain_seconds > 0 and spec.name in self._ready:
                engine.terminate()
            else:
                engine.kill()  # there are no requests to finish
        limit = drain_seconds + self._pace.teardown_seconds
        await asyncio.gather(*(self._see_off(spec, limit) for spec in self._specs.values()))

    async def _see_off(self, spec: EngineSpec, limit_seconds: float) -> None:
        engine = self._engines.get(spec.name)
        detail = ""
        if engine is not None and engine.guard_pid is not None:
            try:
                await asyncio.wait_for(engine.wait(), limit_seconds)
            except TimeoutError:
                detail = f"killed after {limit_seconds:g} s"
                engine.kill()
                await engine.wait()
        self._on_state(spec, EngineState.STOPPED, detail, engine)

    async def _abort(self) -> None:
        self._kill_all()
        await self.stop(0)

    def _kill_all(self) -> None:
        for engine in self._engines.values():
            engine.kill()
