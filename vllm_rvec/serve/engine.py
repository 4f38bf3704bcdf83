"""One engine: a vLLM server in processes of its own, from its launch to its end.

Not here: when to start another one (`supervisor`), and how all of its processes are made to end
(`guard`, the process between).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import psutil

from vllm_rvec.errors import EngineStartupError
from vllm_rvec.serve import guard
from vllm_rvec.serve.engine_log import LONGEST_LINE, LineSplitter, clean, root_cause

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_rvec.serve.plan import EngineSpec

__all__ = ["EngineProcess", "describe_exit"]

LOOPBACK = "127.0.0.1"
LAST_LINES = 60
LINES_FOR_THE_CAUSE = 4000
"""A worker's root cause stands some hundred lines above the end: three processes raise after it."""
PROBE_INTERVAL_SECONDS = 0.2
PROBE_TIMEOUT_SECONDS = 5.0
GUARD_SECONDS = 6.0
"""What a guard gets to end everything: its own 4 s, and some for a busy machine."""
PUMP_SECONDS = 2.0

logger = logging.getLogger(__name__)


class EngineProcess:
    """One launch of an engine; a restart is another one.

    Args:
        spec: What to start.
        on_line: Called with the engine's name and each line that it prints, stripped of control
            sequences.

    Attributes:
        spec: What was started.
        base_url: Where it answers, once started.
        last_lines: The end of what it printed.
    """

    def __init__(self, spec: EngineSpec, on_line: Callable[[str, str], None] | None = None) -> None:
        self.spec = spec
        self.base_url = ""
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._startup_lines: deque[str] | None = deque(maxlen=LINES_FOR_THE_CAUSE)
        self._on_line = on_line
        self._lifeline: int | None = None
        self._guard: asyncio.subprocess.Process | None = None
        self._ended: asyncio.Task[int] | None = None

    def __repr__(self) -> str:
        return f"<EngineProcess {self.spec.name!r} {self.base_url or 'not started'}>"

    @property
    def api_key(self) -> str:
        """The key that the engine asks for, as a bearer token."""
        return self.spec.api_key

    @property
    def guard_pid(self) -> int | None:
        """The guard's process id, which is also the id of the engine's session."""
        return self._guard.pid if self._guard else None

    @property
    def pid(self) -> int | None:
        """The API server's process id, while it runs."""
        if self._guard is None or self._guard.returncode is not None:
            return None
        return _group_leader_below(self._guard.pid)

    @property
    def exit_status(self) -> int | None:
        """The engine's exit status, negative for a signal; None while it runs."""
        return self._ended.result() if self._ended and self._ended.done() else None

    async def start(self) -> None:
        """Launch the engine on a free loopback port; returns at once.

        Raises:
            EngineStartupError: The operating system refuses to start a process.
        """
        try:
            self._guard, output = await self._launch(_free_port())
        except OSError as exc:
            self.kill()
            raise EngineStartupError(
                f"engine {self.spec.name!r} can't be started", why=exc.strerror or str(exc)
            ) from exc
        except BaseException:
            self.kill()
            raise
        self._ended = asyncio.create_task(self._follow(self._guard, output))

    async def wait_until_ready(self, startup_timeout_seconds: float | None = None) -> None:
        """Wait until the engine answers `GET /health` with 200.

        Args:
            startup_timeout_seconds: When to give up and kill it; never when None, since a large
                model takes as long as it takes.

        Raises:
            EngineStartupError: The engine ended first, or time is up.
        """
        ended = self._running()
        ready = asyncio.create_task(self._poll_health())
        try:
            await asyncio.wait(
                {ready, ended},
                timeout=startup_timeout_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if ended.done():
                raise self._startup_error(ended.result())
            if not ready.done():
                self.kill()
                await self.wait()
                raise self._startup_error(None, startup_timeout_seconds)
            ready.result()
        finally:
            ready.cancel()
        self._startup_lines = None

    def terminate(self) -> None:
        """Ask the engine to finish its requests and end; does not wait."""
        if self._guard is not None and self._guard.returncode is None:
            self._guard.terminate()

    def kill(self) -> None:
        """Have all of the engine's processes ended within 4 s; does not wait."""
        if self._lifeline is None:
            return
        os.close(self._lifeline)
        self._lifeline = None
        if self._ended is not None and not self._ended.done():
            asyncio.get_running_loop().call_later(GUARD_SECONDS, self._kill_guard)

    async def wait(self) -> int:
        """Wait until no process of the engine is left.

        Returns:
            The API server's exit status, negative for a signal.
        """
        # Shielded: one caller that gives up must not stop the clean-up.
        return await asyncio.shield(self._running())

    async def _launch(self, port: int) -> tuple[asyncio.subprocess.Process, int]:
        """Start the guard, and through it the engine; returns it and what they print into."""
        self.base_url = f"http://{LOOPBACK}:{port}"
        lifeline, self._lifeline = os.pipe()
        # Not asyncio's PIPE: with it, `wait()` on a killed guard also waits until every process
        # that the guard leaves behind has closed the pipe, and we could never end those.
        output, output_end = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                # By path and with -P: `-m` would import this whole package into the guard.
                *(sys.executable, "-P", str(Path(guard.__file__)), str(lifeline), "--"),
                *self.spec.argv,
                *("--host", LOOPBACK, "--port", str(port)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output_end,
                stderr=output_end,
                env=self.spec.env,
                pass_fds=(lifeline,),
                # Out of the terminal's reach: Ctrl-C is for us, and we let requests finish.
                start_new_session=True,
            )
        except BaseException:
            os.close(output)
            raise
        finally:
            os.close(lifeline)
            os.close(output_end)
        return process, output

    def _running(self) -> asyncio.Task[int]:
        if self._ended is None:
            msg = "the engine has not been started"
            raise RuntimeError(msg)
        return self._ended

    def _kill_guard(self) -> None:
        if self._guard is not None and self._guard.returncode is None:
            self._guard.kill()

    async def _follow(self, process: asyncio.subprocess.Process, output: int) -> int:
        """Pump the engine's lines until it ends, then clear away what a killed guard left."""
        pump = asyncio.create_task(self._pump(output))
        try:
            status = await process.wait()
            await asyncio.to_thread(guard.kill_session, process.pid)
            # Not for ever: a process that left the session could hold the pipe open.
            await asyncio.wait({pump}, timeout=PUMP_SECONDS)
        finally:
            pump.cancel()
            self.kill()  # closes the lifeline; matters when the event loop ends under us
        return 128 - status if status > 128 else status

    async def _pump(self, output: int) -> None:
        stream = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(output, "rb", buffering=0)
        )
        lines = LineSplitter()
        try:
            while chunk := await stream.read(LONGEST_LINE):
                for line in lines.feed(chunk):
                    self._emit(line)
            for line in lines.feed(b"", is_last=True):
                self._emit(line)
        finally:
            transport.close()

    def _emit(self, line: str) -> None:
        line = clean(line)  # here, once: error messages quote lines too
        if self.api_key:
            line = line.replace(self.api_key, "[api key]")
        self.last_lines.append(line)
        if self._startup_lines is not None:
            self._startup_lines.append(line)
        if self._on_line is None:
            return
        try:
            self._on_line(self.spec.name, line)
        except Exception:
            # The pump must go on: an engine whose pipe is full stops in the middle of a request.
            logger.exception("engine %s: its lines can no longer be shown", self.spec.name)
            self._on_line = None

    async def _poll_health(self) -> None:
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while not await self._is_healthy(session):  # noqa: ASYNC110 - another process
                await asyncio.sleep(PROBE_INTERVAL_SECONDS)

    async def _is_healthy(self, session: aiohttp.ClientSession) -> bool:
        try:
            async with session.get(f"{self.base_url}/health") as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    def _startup_error(
        self, status: int | None, timeout_seconds: float | None = None
    ) -> EngineStartupError:
        if status is None:
            what = f"engine {self.spec.name!r} was not ready after {timeout_seconds:g} s"
        else:
            ended = f"ended with {describe_exit(status)}"
            what = f"engine {self.spec.name!r} {ended} before it was ready"
        cause = root_cause(self._startup_lines or ())
        if not cause and self.last_lines and status != -signal.SIGKILL:
            cause = f"its last line was: {self.last_lines[-1].strip()}"
        fix = ""
        if not cause and status == -signal.SIGKILL:
            fix = "when nobody killed it, the kernel did for want of memory: see dmesg"
        return EngineStartupError(
            what,
            why=cause.replace("\n", "\n  "),
            fix=fix,
            last_lines=tuple(self.last_lines),
            exit_status=status,
        )


def describe_exit(status: int) -> str:
    """Say how a process ended.

    Args:
        status: Its exit status, negative for a signal.

    Returns:
        `exit status 2`, or `SIGKILL`.
    """
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _group_leader_below(guard_pid: int) -> int | None:
    """Find the API server: of the guard's children, some adopted, it leads its own group."""
    try:
        children = psutil.Process(guard_pid).children()
        return next((child.pid for child in children if os.getpgid(child.pid) == child.pid), None)
    except (psutil.Error, ProcessLookupError):
        return None
