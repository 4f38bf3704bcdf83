"""vllm_rvec.cli.sweep_sources and sweep_engine: who answers, without an engine."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from vllm_rvec.cli import sweep_sources
from vllm_rvec.cli.sweep_engine import STARTS_IN_A_ROW, OwnEngine
from vllm_rvec.cli.sweep_sources import OwnSource, planned_offer
from vllm_rvec.errors import AlphaChangeFailedError, ConfigError, EngineStartupError
from vllm_rvec.evaluation.arms import placed_arms, wanted_arms
from vllm_rvec.evaluation.config import SweepConfig
from vllm_rvec.serve import EngineConsole, EngineState, ServeConfig, load_config, plan_engines
from vllm_rvec.vector.derive.random_like import random_like
from vllm_rvec.vector.manifest import Manifest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from tests.support.checkpoints import Family
    from vllm_rvec.evaluation.asking import Manner
    from vllm_rvec.evaluation.records import Arm

CONSOLE = Console(stderr=True)


def config(family: Family, vector: Path, output: Path, **written: Any) -> SweepConfig:
    basic = {
        "model": str(family.target),
        "vector": str(vector),
        "tasks": ["a.jsonl"],
        "alphas": "0.5,1.5",
        "output": str(output),
    }
    return SweepConfig.model_validate(basic | written)


@dataclass
class FakeEngine:
    """Notes what it is turned to."""

    settings: ServeConfig
    base_url: str = "http://127.0.0.1:1"
    key: str = "k"
    turns: list[float] = field(default_factory=list)

    async def turn_to(self, alpha: float) -> None:
        """Note it."""
        self.turns.append(alpha)

    async def until_ready(self) -> None:
        """Be ready."""


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[tuple[FakeEngine, str]]:
    """The engines that are started, with their modes."""
    started: list[tuple[FakeEngine, str]] = []

    @asynccontextmanager
    async def running(
        settings: ServeConfig, mode: str, words: tuple[str, ...], console: EngineConsole
    ) -> AsyncIterator[FakeEngine]:
        del words, console
        started.append((FakeEngine(settings), mode))
        yield started[-1][0]

    monkeypatch.setattr(sweep_sources, "engine_running", running)
    return started


def ask(source: OwnSource, settings: SweepConfig) -> list[list[str]]:
    """Have all arms asked; return the groups in which they were."""
    arms = placed_arms(wanted_arms(settings), source.offer()).arms
    source.prepare(arms)
    groups: list[list[str]] = []

    async def note(some: Sequence[Arm], manner: Manner) -> None:
        assert (manner.base_url, manner.key) == ("http://127.0.0.1:1", "k")
        groups.append([arm.name for arm in some])

    asyncio.run(source.ask(arms, note))
    return groups


def test_one_dial_has_both_vectors_and_all_arms(
    family: Family, vector: Path, tmp_path: Path, engines: list[tuple[FakeEngine, str]]
) -> None:
    """In the range that the arms need; the random vector has the norms of the real one."""
    settings = config(family, vector, tmp_path / "out")
    source = OwnSource(settings, CONSOLE)
    (group,) = ask(source, settings)
    assert len(group) == 9
    ((engine, mode),) = engines
    assert mode == "dial"
    assert engine.settings.dial.vectors == ("vector", "random")
    assert str(engine.settings.alpha_range) == "-1:1.5"
    made = Manifest.read(tmp_path / "out" / "random-vector-0")
    norms = [
        sum(entry.norm**2 for entry in manifest.tensors.values()) ** 0.5
        for manifest in (Manifest.read(vector), made)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert source.subject().how == "dial"
    assert source.subject().vector_digest == Manifest.read(vector).digest
    (spec,) = plan_engines(engine.settings, mode="dial")
    options = json.loads(spec.argv[spec.argv.index("--model-loader-extra-config") + 1])
    assert [one["name"] for one in options["vectors"]] == ["vector", "random"]


def test_a_random_vector_goes_with_the_vector_that_is_swept(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """One that an earlier run has drawn is taken; that of another vector has other norms."""
    out, other = tmp_path / "out", tmp_path / "other"
    random_like(vector, other, seed=1)
    for _ in range(2):
        OwnSource(config(family, vector, out), CONSOLE).prepare([])
    with pytest.raises(ConfigError, match=r"random-vector-0 is no random vector of .*other"):
        OwnSource(config(family, other, out), CONSOLE).prepare([])


def test_without_a_random_arm_the_dial_has_one_vector(
    family: Family, vector: Path, tmp_path: Path, engines: list[tuple[FakeEngine, str]]
) -> None:
    """A second one would cost memory."""
    settings = config(family, vector, tmp_path / "out", arms=["base", "vector"])
    ask(OwnSource(settings, CONSOLE), settings)
    assert len(engines[0][0].settings.dial.vectors) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("written", [{"mode": "live"}, {"engine": {"enable-lora": True}}])
def test_where_no_dial_will_do_a_fused_engine_is_turned(
    family: Family,
    vector: Path,
    tmp_path: Path,
    engines: list[tuple[FakeEngine, str]],
    written: dict[str, Any],
) -> None:
    """One engine for the vector, one for the random vector."""
    settings = config(family, vector, tmp_path / "out", **written)
    groups = ask(OwnSource(settings, CONSOLE), settings)
    assert groups == [
        ["base", "base+prompt"],
        ["-v"],
        ["v@0.5", "v@0.5+prompt"],
        ["v@1.5", "v@1.5+prompt"],
        ["repeat"],
        ["random@1"],
    ]
    assert [(mode, engine.turns) for engine, mode in engines] == [
        ("fused", [0, -1, 0.5, 1.5, 0]),
        ("fused", [1]),
    ]
    assert [engine.settings.variants["swept"].alpha for engine, _ in engines] == [0, 1]
    assert all(engine.settings.has_admin for engine, _ in engines)


def test_why_there_is_no_dial_is_said(
    family: Family, vector: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Unless the other way was asked for: arms then run one after another."""
    OwnSource(config(family, vector, tmp_path, mode="live"), CONSOLE).offer()
    assert not caplog.text
    OwnSource(config(family, vector, tmp_path, engine={"enable-lora": True}), CONSOLE).offer()
    assert "take no adapters" in caplog.text
    assert "a fused engine is brought to each alpha in turn" in caplog.text


def test_a_dial_that_was_asked_for_and_can_not_be_had_is_refused(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """With its reasons."""
    settings = config(family, vector, tmp_path, mode="dial", engine={"pipeline-parallel-size": 2})
    with pytest.raises(ConfigError, match="a dial engine can't be used here"):
        OwnSource(settings, CONSOLE).offer()


def test_a_plan_needs_nothing_but_what_is_here(
    family: Family, vector: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ids of the Hub are checked for their form."""
    how, offer = planned_offer(config(family, vector, tmp_path), CONSOLE)
    assert (how, offer.place(1.5, is_random=True).problem) == ("dial", "")
    elsewhere = config(family, vector, tmp_path).model_copy(
        update={"model": "owner/name@main", "vector": "s3://b/v"}
    )
    assert planned_offer(elsewhere, CONSOLE)[0] == "dial"
    assert "the model would be fetched: owner/name@main" in caplog.text
    assert "the vector would be fetched: s3://b/v" in caplog.text
    with pytest.raises(ConfigError, match=r"`model`: there is no folder \./nowhere"):
        planned_offer(config(family, vector, tmp_path, model="./nowhere"), CONSOLE)


@pytest.fixture
def own(family: Family, vector: Path) -> OwnEngine:
    settings = load_config(
        None,
        {
            "model": str(family.target),
            "vector": str(vector),
            "variants": {"swept": {"alpha": 0}},
            "mode": "fused",
        },
    )
    engine = OwnEngine(settings, "fused", (), EngineConsole(CONSOLE))
    engine.describe()
    return engine


def put(engine: OwnEngine, state: EngineState, detail: str = "") -> None:
    engine._on_state(engine._spec, state, detail, None)


def test_an_engine_that_starts_again_is_waited_for(own: OwnEngine) -> None:
    """And given up after several starts that failed."""

    async def run() -> None:
        put(own, EngineState.READY)
        await own.until_ready()
        put(own, EngineState.DOWN, "ended with SIGKILL")
        waiting = asyncio.create_task(own.until_ready())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        put(own, EngineState.STARTING)
        put(own, EngineState.READY)
        await waiting
        for _ in range(STARTS_IN_A_ROW):
            put(own, EngineState.DOWN, "no memory")
        with pytest.raises(EngineStartupError, match=r"did not start again(.|\n)*no memory"):
            await own.until_ready()

    asyncio.run(run())


def test_a_change_of_alpha_that_broke_off_is_tried_again(
    own: OwnEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the engine is back; and answers then say the new alpha."""
    asked: list[float] = []

    async def change(_: str, alpha: float) -> None:
        asked.append(alpha)
        if len(asked) == 1:
            asyncio.get_running_loop().call_later(0.01, put, own, EngineState.READY)
            raise AlphaChangeFailedError("broke off")

    monkeypatch.setattr(own.supervisor, "change_alpha", change)

    async def run() -> None:
        put(own, EngineState.READY)
        await own.turn_to(0)
        assert asked == []
        await own.turn_to(0.5)
        await own.turn_to(0.5)

    asyncio.run(run())
    assert asked == [0.5, 0.5]
    facts = own.variants.facts("swept")
    assert facts is not None
    assert facts.alpha == 0.5


def test_the_engine_keeps_quiet_unless_told_otherwise(family: Family, vector: Path) -> None:
    """A line of log for each request would be thousands."""
    basic = {"model": str(family.target), "vector": str(vector), "variants": {"s": {"alpha": 0}}}
    console = EngineConsole(CONSOLE)
    quiet = OwnEngine(load_config(None, basic), "fused", (), console)
    assert "--disable-uvicorn-access-log" in quiet._spec.argv
    said = ("--no-disable-uvicorn-access-log",)
    loud = OwnEngine(load_config(None, basic), "fused", said, console)
    assert "--disable-uvicorn-access-log" not in loud._spec.argv
