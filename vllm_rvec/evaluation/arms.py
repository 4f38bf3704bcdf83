"""The arms of a sweep: which are wanted, and how each is asked for where that is possible.

Not here: what an address can do (`offer`), and the asking (`asking`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_rvec.evaluation.records import Arm, ArmKind
from vllm_rvec.vector.alpha import alpha_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm_rvec.evaluation.config import SweepConfig
    from vllm_rvec.evaluation.offer import Offer

__all__ = ["Missing", "Plan", "Stage", "Wanted", "placed_arms", "stages_of", "wanted_arms"]

MINUS = -1.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """An arm before it is known whether and how it can be asked for."""

    name: str
    kind: ArmKind
    alpha: float
    is_prompted: bool = False

    @property
    def is_random(self) -> bool:
        """Whether alpha is the random vector's."""
        return self.kind is ArmKind.RANDOM


@dataclass(frozen=True, slots=True)
class Missing:
    """An arm that can't be asked for."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be asked, and what can't be."""

    arms: tuple[Arm, ...]
    missing: tuple[Missing, ...] = ()


@dataclass(frozen=True, slots=True)
class Stage:
    """Arms that one setting of a fused engine serves."""

    alpha: float
    is_random: bool
    """Whether the engine's vector is the random one."""
    arms: tuple[Arm, ...]


def wanted_arms(config: SweepConfig) -> tuple[Wanted, ...]:
    """List the arms that a configuration asks for, each name once.

    Alpha 0 is `base`, and alpha -1 is `-v`, whether or not they are among the alphas.
    """
    asked = set(config.arms)
    return tuple(one for one in _all_arms(config) if one.kind in asked)


def _all_arms(config: SweepConfig) -> Iterator[Wanted]:
    yield Wanted("base", ArmKind.BASE, 0.0)
    yield Wanted("base+prompt", ArmKind.BASE_PROMPT, 0.0, is_prompted=True)
    for alpha in _other_than(config.alphas, config):
        yield Wanted(f"v@{alpha_text(alpha)}", ArmKind.VECTOR, alpha)
    for alpha in config.prompted_alphas:
        name = f"v@{alpha_text(alpha)}+prompt"
        yield Wanted(name, ArmKind.VECTOR_PROMPT, alpha, is_prompted=True)
    yield Wanted("-v", ArmKind.MINUS, MINUS)
    for alpha in config.random_alphas:
        yield Wanted(f"random@{alpha_text(alpha)}", ArmKind.RANDOM, alpha)
    yield Wanted("repeat", ArmKind.REPEAT, 0.0)


def _other_than(alphas: Sequence[float], config: SweepConfig) -> Iterator[float]:
    """Leave out what another arm is."""
    has_minus = ArmKind.MINUS in config.arms
    yield from (alpha for alpha in alphas if alpha and not (has_minus and alpha == MINUS))


def placed_arms(wanted: Sequence[Wanted], offer: Offer) -> Plan:
    """Find how each arm is asked for."""
    arms: list[Arm] = []
    missing: list[Missing] = []
    for one in wanted:
        place = offer.place(one.alpha, is_random=one.is_random)
        if place.problem:
            missing.append(Missing(one.name, place.problem))
            continue
        arms.append(Arm(one.name, one.kind, one.alpha, place.model, place.alphas, one.is_prompted))
    return Plan(tuple(arms), tuple(missing))


def stages_of(arms: Sequence[Arm]) -> tuple[Stage, ...]:
    """Sort arms by what a fused engine must be brought to: the vector's alphas, then the random's.

    Alpha 0 comes first, and the repeat of it last of the vector's, as far from the first as can be.
    """
    stages: list[Stage] = []
    for is_random in (False, True):
        own = [arm for arm in arms if (arm.kind is ArmKind.RANDOM) == is_random]
        repeats = [arm for arm in own if arm.kind is ArmKind.REPEAT]
        others = [arm for arm in own if arm.kind is not ArmKind.REPEAT]
        for alpha in sorted({arm.alpha for arm in others}, key=lambda alpha: (alpha != 0, alpha)):
            group = tuple(arm for arm in others if arm.alpha == alpha)
            stages.append(Stage(alpha, is_random, group))
        if repeats:
            stages.append(Stage(0.0, is_random, tuple(repeats)))
    return tuple(stages)
