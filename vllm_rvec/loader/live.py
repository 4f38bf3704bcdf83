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
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import try_to_load_from_cache

from vllm_rvec.checkpoint.fetch import locate_vector
from vllm_rvec.checkpoint.table import is_folder
from vllm_rvec.errors import (
    ERROR_MARKER,
    AlphaChangeFailedError,
    AlphaChangeRefusedError,
    RvecError,
)
from vllm_rvec.loader.config import LoaderConfig
from vllm_rvec.loader.kv_stores import foreign_connectors
from vllm_rvec.loader.stamps import FileStamps
from vllm_rvec.vector.reader import VectorReader

if TYPE_CHECKING:
    from vllm_rvec.loader.vllm_api import EngineClient, VllmConfig

__all__ = ["AlphaChange", "LiveAlpha"]

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


class LiveAlpha:
    """The alpha of one engine.

    Args:
        engine: vLLM's client of it, at the end of its start.

    Raises:
        RvecError: The vector can't be found any more.
    """

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._files = FileStamps.take(_stored_folders(engine.vllm_config))
        self._running: asyncio.Task[AlphaChange] | None = None
        self._failure: AlphaChangeFailedError | None = None

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
            old_alpha, alpha, drained - started, time.perf_counter() - drained, ranks
        )
        logger.info(
            "Changed alpha from %s to %s: drained in %.2f s, reloaded in %.2f s on %d ranks",
            done.old_alpha,
            done.alpha,
            done.drain_seconds,
            done.reload_seconds,
            done.ranks,
        )
        return done

    async def _refuse_what_can_be_known(self) -> None:
        """Find what would make the reload fail, or wrong, while nothing is touched."""
        if await self._engine.is_paused() or await self._engine.is_sleeping():
            raise AlphaChangeRefusedError(
                "the engine is paused or asleep", fix="wake it up or resume it, then ask again"
            )
        if foreign := foreign_connectors(self._engine.vllm_config.kv_transfer_config):
            raise AlphaChangeRefusedError(
                "alpha can't be changed on an engine with a shared KV store",
                why=f"{' and '.join(foreign)} may keep keys and values of the old alpha",
                fix="start an engine at this alpha, with a store of its own",
            )
        if problems := await asyncio.to_thread(self._file_problems):
            raise AlphaChangeRefusedError(
                "the files that this engine was loaded from are no longer the same",
                problems=problems,
                why="a reload would serve other weights than a change of alpha makes",
                fix="start the engine again",
            )

    def _file_problems(self) -> list[str]:
        if problems := self._files.problems():
            return problems
        try:
            for folder in _vector_folders(self._config):
                VectorReader(folder)
        except RvecError as exc:
            return [exc.what]
        return []

    async def _drain(self, seconds: float) -> None:
        """Let requests under way end, hold back new ones, and empty every cache."""
        try:
            await asyncio.wait_for(self._engine.pause_generation(mode="wait"), seconds)
        except BaseException as exc:
            await self._engine.resume_generation()
            if isinstance(exc, TimeoutError):
                raise AlphaChangeRefusedError(
                    f"requests under way did not end within {seconds:g} s",
                    fix="ask again when fewer or shorter ones are under way, or allow more seconds",
                ) from exc
            raise

    async def _reload(self, extra: dict[str, Any]) -> int:
        """Reload on every rank; the number of ranks. No way back from here."""
        overrides = {"load_config": {"model_loader_extra_config": extra}}
        await self._engine.collective_rpc("update_config", kwargs={"overrides": overrides})
        ranks = await self._engine.collective_rpc("reload_weights")
        # Empty since the drain, as nothing was computed; and this says whether it really is.
        if not await self._engine.reset_prefix_cache(reset_connector=True):
            msg = "the prefix cache could not be emptied"
            raise RuntimeError(msg)
        config = self._engine.vllm_config
        config.load_config = dataclasses.replace(
            config.load_config, model_loader_extra_config=extra
        )
        await self._engine.resume_generation()
        return len(ranks)


def _stored_folders(config: VllmConfig) -> list[Path]:
    folders = _vector_folders(LoaderConfig.split(config.load_config.model_loader_extra_config)[0])
    if (target := _target_folder(config.model_config)) is not None:
        folders.append(target)
    return folders


def _vector_folders(config: LoaderConfig) -> list[Path]:
    return [locate_vector(config.vector).folder]


def _target_folder(model_config: Any) -> Path | None:
    """The target's folder, also in the Hub's cache; None for what vLLM streams from elsewhere."""
    if is_folder(folder := Path(model_config.model)):
        return folder
    try:
        found = try_to_load_from_cache(
            model_config.model, "config.json", revision=model_config.revision
        )
    except ValueError:  # no Hub id either
        return None
    return Path(found).parent if isinstance(found, str) else None
