"""Change alpha on a live engine: drain it, reload its weights in place, take requests again.

The reload is vLLM's own `reload_weights`: it reads the stored target anew and fuses it as a start
does, so nothing drifts, and the result is that of an engine started at this alpha, bit for bit.

vLLM's reload can't be undone half-way: layers are left with some of their weights buffered. So all
that can be known wrong is found before anything is touched, and refused; a failure after that
leaves the engine paused for ever, and whoever runs it has to end it.

Runs in the API server's process. Not here: HTTP (`admin`), and what becomes of a failed engine.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_rvec.errors import (
    ERROR_MARKER,
    AlphaChangeFailedError,
    AlphaChangeRefusedError,
)
from vllm_rvec.loader.config import LoaderConfig
from vllm_rvec.loader.worker import RvecWorker

if TYPE_CHECKING:
    from vllm_rvec.loader.vllm_api import EngineClient

__all__ = ["AlphaChange", "LiveAlpha", "has_our_workers"]

# As in `model_loader`: vLLM gives handlers to loggers under its own name only.
logger = logging.getLogger("vllm.rvec")


@dataclass(frozen=True, slots=True)
class AlphaChange:
    """A change that came about."""

    old_alpha: float
    """What was served before."""
    alpha: float
    """What is served now."""
    drain_seconds: float
    """How long requests under way took to end."""
    reload_seconds: float
    """How long the weights took: read, fused, made into the kernels' layout."""
    ranks: int
    """How many workers reloaded."""
    copies: int
    """Sums that they computed straight into parameters, all ranks together; none at alpha 0."""


def has_our_workers(engine: EngineClient) -> bool:
    """Whether the engine was started with our worker extension, or one that inherits from it."""
    name: str = engine.vllm_config.parallel_config.worker_extension_cls
    module, _, attribute = name.rpartition(".")
    if not module:
        return False
    extension = getattr(importlib.import_module(module), attribute, None)
    return isinstance(extension, type) and issubclass(extension, RvecWorker)


class LiveAlpha:
    """The alpha of one engine, which has our workers. Call `note_files` first.

    Args:
        engine: vLLM's client of it.
    """

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._running: asyncio.Task[AlphaChange] | None = None
        self._failure: AlphaChangeFailedError | None = None

    async def note_files(self) -> None:
        """Have each worker note what it was loaded from: at the end of the engine's start."""
        await self._engine.collective_rpc("rvec_note_files")

    @property
    def alpha(self) -> float:
        """What the engine serves now."""
        return self._config.alpha

    async def change(self, alpha: float, *, drain_seconds: float) -> AlphaChange:
        """Have the engine serve another alpha.

        Goes on to its end when the caller is cancelled.

        Args:
            alpha: A finite number of float32's range.
            drain_seconds: How long requests under way may take to end. New ones wait.

        Returns:
            What was done. The same alpha again is a change too.

        Raises:
            ConfigError: It is no alpha.
            AlphaChangeRefusedError: Nothing was touched; requests go on at the old alpha.
            AlphaChangeFailedError: The engine is paused for ever, and must be ended.
        """
        if self._failure is not None:
            raise self._failure
        if self._running is not None and not self._running.done():
            raise AlphaChangeRefusedError(
                "another change is under way", fix="wait for its end, then ask again"
            )
        extra = self._extra | {"alpha": alpha}
        LoaderConfig.split(extra)
        self._running = asyncio.create_task(self._change(extra, alpha, drain_seconds))
        return await asyncio.shield(self._running)

    @property
    def _extra(self) -> dict[str, Any]:
        extra: dict[str, Any] = self._engine.vllm_config.load_config.model_loader_extra_config
        return extra

    @property
    def _config(self) -> LoaderConfig:
        return LoaderConfig.split(self._extra)[0]

    async def _change(
        self, extra: dict[str, Any], alpha: float, drain_seconds: float
    ) -> AlphaChange:
        old_alpha = self.alpha
        if await self._engine.is_paused() or await self._engine.is_sleeping():
            raise AlphaChangeRefusedError(
                "the engine is paused or asleep", fix="wake it up or resume it, then ask again"
            )
        await self._refuse_what_can_be_known()
        started = time.perf_counter()
        await self._drain(drain_seconds)
        drained = time.perf_counter()
        try:
            ranks = await self._reload(extra)
        except BaseException as exc:
            self._failure = AlphaChangeFailedError(
                f"the change from alpha {old_alpha:g} to {alpha:g} failed part-way",
                why=str(exc) or type(exc).__name__,
                fix="end this engine and start it again: it does not answer any more, since its "
                "weights may be a mixture",
            )
            logger.exception("%s%s", ERROR_MARKER, self._failure)
            raise self._failure from exc
        done = AlphaChange(
            old_alpha,
            alpha,
            drained - started,
            time.perf_counter() - drained,
            len(ranks),
            sum(ranks),
        )
        logger.info(
            "Changed alpha from %s to %s: drained in %.2f s, reloaded in %.2f s, "
            "%d copies on %d ranks",
            done.old_alpha,
            done.alpha,
            done.drain_seconds,
            done.reload_seconds,
            done.copies,
            done.ranks,
        )
        return done

    async def _refuse_what_can_be_known(self) -> None:
        """Find what would make the reload fail, or wrong, while nothing is touched."""
        found: list[list[str]] = await self._engine.collective_rpc("rvec_check")
        if problems := sorted({problem for rank in found for problem in rank}):
            raise AlphaChangeRefusedError(
                "alpha can't be changed on this engine",
                problems=problems,
                fix="start an engine at this alpha",
            )

    async def _drain(self, seconds: float) -> None:
        """Let requests under way end, hold back new ones, and empty every cache."""
        try:
            await asyncio.wait_for(self._engine.pause_generation(mode="wait"), seconds)
            # Again: it may have taken a while.
            await self._refuse_what_can_be_known()
        except BaseException as exc:
            await self._engine.resume_generation()
            if isinstance(exc, TimeoutError):
                raise AlphaChangeRefusedError(
                    f"requests under way did not end within {seconds:g} s",
                    fix="ask again when fewer or shorter ones are under way, or allow more seconds",
                ) from exc
            raise

    async def _reload(self, extra: dict[str, Any]) -> list[int]:
        """Reload on every rank; return their copies. There is no way back from here."""
        done: list[int] = await self._engine.collective_rpc("rvec_reload", args=(extra,))
        # Empty since the drain, as nothing was computed; and this says whether it really is.
        if not await self._engine.reset_prefix_cache(reset_connector=True):
            msg = "the prefix cache could not be emptied"
            raise RuntimeError(msg)
        config = self._engine.vllm_config
        config.load_config = dataclasses.replace(
            config.load_config, model_loader_extra_config=extra
        )
        await self._engine.resume_generation()
        return done
