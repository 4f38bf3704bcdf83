"""Another alpha on an engine: asked for over HTTP, kept for its next start, never half done."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.serve.conftest import all_gone, stand_in_spec, until
from tests.serve.test_supervisor import QUICK, Stage
from vllm_rvec.errors import AlphaChangeFailedError, AlphaChangeRefusedError
from vllm_rvec.serve import EngineState, Pace

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vllm_rvec.serve import EngineSpec

OPTIONS = json.dumps({"vector": "v", "alpha": 1.0, "force": False})


def spec(how: str) -> EngineSpec:
    return stand_in_spec("a", "--alpha", how, "--model-loader-extra-config", OPTIONS)


def started_at(stage: Stage) -> float:
    """The alpha in the command line of the engine that was launched last."""
    (line,) = [x for x in stage.engines[-1].last_lines if x.startswith("options ")]
    alpha: float = json.loads(line.removeprefix("options "))["alpha"]
    return alpha


def run(stage: Stage, check: Callable[[], Awaitable[None]]) -> None:
    """Start, check beside a running supervisor, stop."""

    async def all_of_it() -> None:
        assert await stage.supervisor.start()
        watching = asyncio.create_task(stage.supervisor.run())
        await check()
        await stage.supervisor.stop(0)
        await watching

    asyncio.run(all_of_it())


def test_a_changed_engine_starts_again_at_its_new_alpha() -> None:
    """Whatever ends it: the command line follows the change, and nothing else in it moves."""
    stage = Stage(spec("change"))

    async def check() -> None:
        done = await stage.supervisor.change_alpha("a", 0.3)
        assert (done.old_alpha, done.alpha, done.ranks, done.copies) == (1.0, 0.3, 2, 7)
        assert len(stage.engines) == 1
        pid = stage.engines[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: len(stage.engines) == 2 and stage.is_all_ready(), "it is back")
        await until(lambda: started_at(stage) == 0.3, "its command line is read")
        (variant,) = stage.engines[1].spec.variants
        assert variant.alpha == 0.3
        before, after = (engine.spec.argv for engine in stage.engines)
        assert [b for b, a in zip(before, after, strict=True) if a != b] == [OPTIONS]

    run(stage, check)


def test_what_the_engine_refuses_changes_nothing() -> None:
    """It goes on, with its reason in the error."""
    stage = Stage(spec("refuse"))

    async def check() -> None:
        with pytest.raises(AlphaChangeRefusedError, match="the engine would refuse"):
            await stage.supervisor.change_alpha("a", 0.3)
        assert stage.is_all_ready()
        assert len(stage.engines) == 1
        (variant,) = stage.engines[0].spec.variants
        assert variant.alpha == 1.0

    run(stage, check)


def test_a_failed_engine_is_killed_and_starts_at_its_old_alpha() -> None:
    """Down at once, with the reason; none of its processes is left."""
    stage = Stage(spec("break"))

    async def check() -> None:
        await stage.all_printed()
        pids = stage.pids()
        with pytest.raises(AlphaChangeFailedError, match="the engine would break"):
            await stage.supervisor.change_alpha("a", 0.3)
        assert stage.states[-1] == ("a", EngineState.DOWN)
        assert "the engine would break" in stage.details[-1]
        with pytest.raises(AlphaChangeRefusedError, match="not ready"):
            await stage.supervisor.change_alpha("a", 0.3)
        await until(lambda: len(stage.engines) == 2 and stage.is_all_ready(), "it is back")
        await until(lambda: started_at(stage) == 1.0, "its command line is read")
        assert all_gone(pids)()

    run(stage, check)


def test_an_engine_killed_in_the_middle_of_a_change_comes_back_as_it_was() -> None:
    """Kill -9: the change fails at once, and is not remembered."""
    stage = Stage(spec("hang"))

    async def check() -> None:
        changing = asyncio.create_task(stage.supervisor.change_alpha("a", 0.3))
        await until(lambda: "changing" in stage.engines[0].last_lines, "it is under way")
        with pytest.raises(AlphaChangeRefusedError, match="under way"):
            await stage.supervisor.change_alpha("a", 0.5)
        pid = stage.engines[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(AlphaChangeFailedError, match="broke off"):
            await changing
        await until(lambda: len(stage.engines) == 2 and stage.is_all_ready(), "it is back")
        await until(lambda: started_at(stage) == 1.0, "its command line is read")

    run(stage, check)


def test_a_change_that_hangs_is_given_up() -> None:
    """The engine is killed, since nobody knows what its weights are."""
    pace = Pace(
        first_delay_seconds=QUICK.first_delay_seconds, least_change_seconds=0.2, start_factor=0
    )
    stage = Stage(spec("hang"), pace=pace)

    async def check() -> None:
        with pytest.raises(AlphaChangeFailedError, match=r"within 0.2 s"):
            await stage.supervisor.change_alpha("a", 0.3)
        await until(lambda: len(stage.engines) == 2 and stage.is_all_ready(), "it is back")

    run(stage, check)


def test_stopping_in_the_middle_of_a_change_leaves_no_process() -> None:
    """The change fails, and nothing is started again."""
    stage = Stage(spec("hang"))

    async def check() -> None:
        await stage.all_printed()
        changing = asyncio.create_task(stage.supervisor.change_alpha("a", 0.3))
        await until(lambda: "changing" in stage.engines[0].last_lines, "it is under way")
        await stage.supervisor.stop(0)
        with pytest.raises(AlphaChangeFailedError):
            await changing
        assert stage.states[-1] == ("a", EngineState.STOPPED)
        assert len(stage.engines) == 1
        assert all_gone(stage.pids())()

    run(stage, check)
