"""vllm_rvec.evaluation.arms: which arms there are, and how each is asked for."""

from __future__ import annotations

from typing import Any

from vllm_rvec.evaluation.arms import Missing, placed_arms, stages_of, wanted_arms
from vllm_rvec.evaluation.config import SweepConfig
from vllm_rvec.evaluation.offer import DialOffer, FixedOffer, TurnedOffer
from vllm_rvec.evaluation.records import ArmKind
from vllm_rvec.vector.dial import AlphaRange


def config(**written: Any) -> SweepConfig:
    basic = {"model": "m", "vector": "v", "tasks": ["a.jsonl"]}
    return SweepConfig.model_validate(basic | written)


def names(**written: Any) -> list[str]:
    return [arm.name for arm in wanted_arms(config(**written))]


def test_all_kinds_are_wanted_unless_some_are_named() -> None:
    """The paper's arms and the controls."""
    assert names(alphas="0.5,1") == [
        *("base", "base+prompt", "v@0.5", "v@1", "v@0.5+prompt", "v@1+prompt"),
        *("-v", "random@1", "repeat"),
    ]
    assert names(alphas="0.5", arms=["base", "random"], random_alphas=[0.5, 1]) == [
        *("base", "random@0.5", "random@1"),
    ]


def test_no_arm_is_asked_twice_under_two_names() -> None:
    """Alpha 0 is the base, and -1 is -v; without that arm, it is an alpha like others."""
    assert names(alphas="-1:1:1", arms=["base", "vector", "minus"]) == ["base", "v@1", "-v"]
    assert names(alphas="-1:1:1", arms=["base", "vector"]) == ["base", "v@-1", "v@1"]


def test_the_prompt_is_tried_at_positive_alphas_unless_others_are_named() -> None:
    """A vector that is taken away is not asked to think."""
    assert names(alphas="-0.5:0.5:0.5", arms=["base", "vector+prompt"]) == ["base", "v@0.5+prompt"]
    given = names(alphas="1", prompt_alphas="-0.5,0", arms=["base", "vector+prompt"])
    assert given == ["base", "v@-0.5+prompt"]


def test_arms_are_placed_where_they_can_be_had() -> None:
    """Each with the reason where not."""
    plan = placed_arms(wanted_arms(config(alphas="0.5,3")), DialOffer("base", AlphaRange(-1, 2)))
    assert [one.name for one in plan.missing] == ["v@3", "v@3+prompt", "random@1"]
    by_name = {arm.name: arm for arm in plan.arms}
    assert by_name["v@0.5+prompt"].alphas == 0.5
    assert by_name["v@0.5+prompt"].is_prompted
    fixed = placed_arms(wanted_arms(config(alphas="0.5")), FixedOffer({"base": 0, "half": 0.5}))
    assert {arm.name: arm.model for arm in fixed.arms if not arm.is_prompted} == {
        "base": "base",
        "v@0.5": "half",
        "repeat": "base",
    }
    assert fixed.missing[0] == Missing("-v", "no variant has alpha -1; there are 0, 0.5")


def test_a_fused_engine_is_turned_once_for_each_alpha() -> None:
    """Base first, the repeat last of the vector's, then the random vector's own engine."""
    plan = placed_arms(wanted_arms(config(alphas="0.5,1")), TurnedOffer("swept"))
    stages = stages_of(plan.arms)
    assert [(s.alpha, s.is_random, [arm.name for arm in s.arms]) for s in stages] == [
        (0, False, ["base", "base+prompt"]),
        (-1, False, ["-v"]),
        (0.5, False, ["v@0.5", "v@0.5+prompt"]),
        (1, False, ["v@1", "v@1+prompt"]),
        (0, False, ["repeat"]),
        (1, True, ["random@1"]),
    ]
    assert all(arm.model == "swept" and arm.alphas is None for arm in plan.arms)
    assert {arm.kind for arm in plan.arms} == {*ArmKind}
