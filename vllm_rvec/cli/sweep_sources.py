"""Who answers a sweep: an address that serves already, or an engine of the sweep's own.

An engine of its own is a dial, which takes all arms in one batch; where the dial can't serve this
model or vector, a fused engine is brought to each alpha in turn, as `PUT /v1/rvec/variants` does.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Protocol

import aiohttp
from rich.console import Console

from vllm_rvec.checkpoint.digest import file_digest
from vllm_rvec.checkpoint.fetch import locate_checkpoint
from vllm_rvec.checkpoint.hub import HubId
from vllm_rvec.checkpoint.remote import is_url, shown
from vllm_rvec.checkpoint.table import is_folder
from vllm_rvec.cli.locating import find_vector
from vllm_rvec.cli.progress import show_progress, show_when_slow
from vllm_rvec.cli.sweep_engine import OwnEngine, engine_running
from vllm_rvec.errors import ConfigError, FetchError
from vllm_rvec.evaluation.arms import stages_of, wanted_arms
from vllm_rvec.evaluation.asking import Manner
from vllm_rvec.evaluation.config import SweepConfig
from vllm_rvec.evaluation.identity import sampled_digest
from vllm_rvec.evaluation.offer import DialOffer, Offer, TurnedOffer, read_offer
from vllm_rvec.evaluation.record import How
from vllm_rvec.evaluation.records import Arm, ArmKind
from vllm_rvec.evaluation.sweep import Subject
from vllm_rvec.serve import (
    EngineConsole,
    ServeConfig,
    choose_mode,
    load_config,
    model_facts,
)
from vllm_rvec.serve.preflight import check_files
from vllm_rvec.vector.compatibility import Verdict
from vllm_rvec.vector.dial import AlphaRange
from vllm_rvec.vector.manifest import MANIFEST_NAME, Manifest

__all__ = ["EndpointSource", "OwnSource", "Source", "planned_offer", "source_of"]

logger = logging.getLogger(__name__)

AskArms = Callable[[Sequence[Arm], Manner], Awaitable[None]]
"""Asks what is still to be asked in some arms, in some manner."""

MODELS_SECONDS = 30.0
VECTOR, RANDOM = "vector", "random"
"""What the vectors are called in a dial of ours."""
SWEPT = "swept"
"""The one variant of a fused engine, whatever its alpha."""


class Source(Protocol):
    """Who answers."""

    def offer(self) -> Offer:
        """What can be asked for."""

    def subject(self) -> Subject:
        """What is swept."""

    def prepare(self, arms: Sequence[Arm]) -> None:
        """Prepare for asking in these arms: whatever takes long, and can fail."""

    async def ask(self, arms: Sequence[Arm], ask: AskArms) -> None:
        """Have all arms asked."""


def source_of(config: SweepConfig, console: Console, *, verbose: bool = False) -> Source:
    """Find who answers.

    Args:
        config: Of the sweep.
        console: Where engines are shown.
        verbose: Show every line of theirs.
    """
    if config.endpoint is not None:
        return EndpointSource(config)
    return OwnSource(config, console, verbose=verbose)


def _manner(
    config: SweepConfig,
    base_url: str,
    key: str | None,
    until_ready: Callable[[], Awaitable[None]] | None = None,
) -> Manner:
    return Manner(
        base_url,
        key,
        temperature=config.temperature,
        retries=config.retries,
        timeout_seconds=config.timeout_seconds,
        until_ready=until_ready,
    )


@dataclass(slots=True)
class EndpointSource:
    """An address where variants are served."""

    config: SweepConfig
    found: Offer | None = None

    def offer(self) -> Offer:
        """Ask for its models, once."""
        if self.found is None:
            self.found = asyncio.run(self._ask_models())
            self._check_vector(self.found)
        return self.found

    def subject(self) -> Subject:
        """What it says of itself; its target is on another machine, as far as can be told."""
        offer = self.offer()
        return Subject("endpoint", self.config.model or "", None, offer.vector, offer.fingerprint)

    def prepare(self, arms: Sequence[Arm]) -> None:
        """Nothing has to be prepared."""

    async def ask(self, arms: Sequence[Arm], ask: AskArms) -> None:
        """All in one go."""
        await ask(arms, _manner(self.config, self._address, self.config.api_key()))

    @property
    def _address(self) -> str:
        return self.config.endpoint or ""

    async def _ask_models(self) -> Offer:
        key = self.config.api_key()
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        timeout = aiohttp.ClientTimeout(total=MODELS_SECONDS)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(
                    f"{self._address}/v1/models", headers=headers, allow_redirects=False
                ) as response,
            ):
                status, body = response.status, await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            why = "it does not answer in time" if isinstance(exc, TimeoutError) else str(exc)
            raise FetchError(f"Can't ask {self._address} for its models.", why=why) from exc
        if status != 200:
            fix = "Set a key of the server's: VLLM_RVEC_API_KEY, or `api_key_env`."
            raise FetchError(
                f"{self._address} does not list its models.",
                why=f"HTTP status {status}",
                fix=fix
                if status in {401, 403}
                else "Give the address of a server of OpenAI's API.",
            )
        return read_offer(body, self._address, self.config.model)

    def _check_vector(self, offer: Offer) -> None:
        """Refuse an address that serves another vector than the one that was named."""
        folder = Path(self.config.vector or "")
        if self.config.vector is None or offer.fingerprint is None or not is_folder(folder):
            return
        digest = f"blake3:{Manifest.read(folder).digest}"
        if digest != offer.fingerprint:
            raise ConfigError(
                f"{self._address} serves another vector than {self.config.vector}",
                problems=[f"there {offer.fingerprint}", f"here {digest}"],
                fix="leave `vector` out, or serve that one",
            )


class OwnSource:
    """An engine that is started for the sweep, and ends with it.

    Args:
        config: Of the sweep.
        console: Where the engine is shown.
        verbose: Show every line of it.
    """

    def __init__(self, config: SweepConfig, console: Console, *, verbose: bool = False) -> None:
        self._config = config
        self._console = EngineConsole(console, verbose=verbose)
        self._has_random = ArmKind.RANDOM in config.arms

    def offer(self) -> Offer:
        """Any alpha that is wanted, one way or the other."""
        if not self._is_dial:
            return TurnedOffer(SWEPT, has_random=self._has_random)
        return self._dial_offer()

    @property
    def how(self) -> How:
        """By a dial, or by a fused engine in turn."""
        return "dial" if self._is_dial else "live"

    def assumed(self) -> tuple[How, Offer]:
        """What could be asked for, if nothing rules the dial out."""
        if self._config.mode == "live":
            return "live", TurnedOffer(SWEPT, has_random=self._has_random)
        return "dial", self._dial_offer()

    def _dial_offer(self) -> DialOffer:
        names = (VECTOR, RANDOM) if self._has_random else (None, None)
        return DialOffer("base", self._range, *names)

    def subject(self) -> Subject:
        """Target and vector, with their digests."""
        return Subject(
            self.how,
            self._config.model or "",
            sampled_digest(self._target),
            self._config.vector,
            Manifest.read(self._vector).digest,
        )

    def prepare(self, arms: Sequence[Arm]) -> None:
        """Make the random vector, and check that all belong together."""
        if self._has_random:
            self._make_random()
        for settings in self._all_settings(arms):
            with show_when_slow("verifying the vector") as on_progress:
                found = check_files(
                    settings, "dial" if self._is_dial else "fused", on_progress=on_progress
                )
            for report in found.reports:
                for line in report.lines(Verdict.WARN):
                    logger.warning("vector and target: %s", line)

    async def ask(self, arms: Sequence[Arm], ask: AskArms) -> None:
        """All arms in one batch where the engine is a dial, else alpha by alpha."""
        if self._is_dial:
            await self._ask_dial(arms, ask)
        else:
            await self._ask_in_turn(arms, ask)

    async def _ask_dial(self, arms: Sequence[Arm], ask: AskArms) -> None:
        settings, words = self._dial_settings(), self._config.engine_words
        async with engine_running(settings, "dial", words, self._console) as engine:
            await ask(arms, self._manner(engine))

    async def _ask_in_turn(self, arms: Sequence[Arm], ask: AskArms) -> None:
        words = self._config.engine_words
        for is_random, group in groupby(stages_of(arms), key=lambda stage: stage.is_random):
            stages = list(group)
            settings = self._fused_settings(stages[0].alpha, is_random=is_random)
            async with engine_running(settings, "fused", words, self._console) as engine:
                for stage in stages:
                    await engine.turn_to(stage.alpha)
                    await ask(stage.arms, self._manner(engine))

    def _manner(self, engine: OwnEngine) -> Manner:
        return _manner(self._config, engine.base_url, engine.key, engine.until_ready)

    @cached_property
    def _target(self) -> Path:
        return locate_checkpoint(self._config.model or "").folder

    @cached_property
    def _vector(self) -> Path:
        return find_vector(self._config.vector or "").folder

    @property
    def _random(self) -> Path:
        return self._config.folder / f"random-vector-{self._config.random_seed}"

    def _make_random(self) -> None:
        if is_folder(self._random):
            self._check_random()
            return
        from vllm_rvec.vector.derive.random_like import random_like  # noqa: PLC0415 - torch, slow

        located = find_vector(self._config.vector or "")
        with show_progress("drawing the random vector") as on_progress:
            random_like(
                located, self._random, seed=self._config.random_seed, on_progress=on_progress
            )

    def _check_random(self) -> None:
        """Refuse another vector's: one that was named before, and of which no answer came."""
        steps = Manifest.read(self._random).lineage
        if not steps or file_digest(self._vector / MANIFEST_NAME) not in steps[-1].inputs:
            raise ConfigError(
                f"{self._random} is no random vector of {self._config.vector}",
                why="it was drawn by another vector's norms",
                fix="remove that folder, and it is drawn again; or choose another: --output",
            )

    @cached_property
    def _is_dial(self) -> bool:
        if self._config.mode == "live":
            return False
        settings = self._settings(
            mode=self._config.mode,
            vector=str(self._vector),
            variants={"base": {"alpha": 0}, "enhanced@1": {"alpha": 1}},
        )
        choice = choose_mode(settings, self._config.engine_words, model_facts(settings))
        if choice.mode == "fused":
            logger.warning("no dial: %s", choice.reason)
            logger.warning("a fused engine is brought to each alpha in turn instead")
        return choice.mode == "dial"

    @property
    def _range(self) -> AlphaRange:
        alphas = [one.alpha for one in wanted_arms(self._config)]
        return AlphaRange(min(*alphas, 0.0), max(*alphas, 0.0))

    def _all_settings(self, arms: Sequence[Arm]) -> list[ServeConfig]:
        if self._is_dial:
            return [self._dial_settings()]
        kinds = sorted({arm.kind is ArmKind.RANDOM for arm in arms})
        return [self._fused_settings(0.0, is_random=is_random) for is_random in kinds]

    def _dial_settings(self) -> ServeConfig:
        vectors: dict[str, object] = {"vector": str(self._vector)}
        if self._has_random:
            named = {VECTOR: self._vector, RANDOM: self._random}
            vectors = {"vectors": [{"path": str(p), "name": name} for name, p in named.items()]}
        return self._settings(
            mode="dial",
            alpha_range=str(self._range),
            variants={"base": {"alpha": 0}},
            **vectors,
        )

    def _fused_settings(self, alpha: float, *, is_random: bool) -> ServeConfig:
        return self._settings(
            mode="fused",
            vector=str(self._random if is_random else self._vector),
            variants={SWEPT: {"alpha": alpha}},
            # Nobody gets to use it: what it does is to load the part that changes alphas.
            admin_key=secrets.token_urlsafe(32),
        )

    def _settings(self, **values: object) -> ServeConfig:
        return load_config(
            None,
            {
                "model": str(self._target),
                "vocabulary": self._config.vocabulary,
                "force": self._config.force,
                "engine": self._config.engine_flags,
                "env": self._config.env,
                **values,
            },
        )


def planned_offer(config: SweepConfig, console: Console) -> tuple[How, Offer]:
    """What could be asked for, as far as it shows without fetching anything.

    Args:
        config: Of the sweep.
        console: Where an engine would be shown.

    Raises:
        ConfigError: A reference is neither here nor an id or a URL; what is here rules the sweep
            out.
    """
    if config.endpoint is not None:
        return "endpoint", EndpointSource(config).offer()
    source = OwnSource(config, console)
    references = {"model": config.model or "", "vector": config.vector or ""}
    elsewhere = {
        name: reference for name, reference in references.items() if not is_folder(Path(reference))
    }
    for name, reference in elsewhere.items():
        _check_reference(name, reference)
    if elsewhere:
        logger.warning("whether a dial can serve this will show when all of it is here")
        return source.assumed()
    return source.how, source.offer()


def _check_reference(name: str, reference: str) -> None:
    """Say where a reference that isn't here would be looked for."""
    if HubId.parse(reference) is not None or (name == "vector" and is_url(reference)):
        logger.warning("the %s would be fetched: %s", name, shown(reference))
        return
    if name == "vector":
        logger.warning("the vector is not there yet: %s; `vllm-rvec extract` makes one", reference)
        return
    raise ConfigError(
        f"`{name}`: there is no folder {reference}, and it is no id on the Hub either",
        fix="give a folder, or an id: owner/name or owner/name@revision",
    )
