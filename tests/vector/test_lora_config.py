"""vllm_rvec.vector.lora.config: which adapters are a plain sum, and what scales them."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from vllm_rvec.errors import CheckpointError, CheckpointNotFoundError
from vllm_rvec.vector.lora.config import (
    CONFIG_NAME,
    HARMLESS,
    REFUSED,
    AdapterConfig,
    config_problems,
    read_config,
)

if TYPE_CHECKING:
    from pathlib import Path

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 12}


def parsed(**fields: Any) -> AdapterConfig:
    return AdapterConfig.model_validate(PLAIN | fields)


def written(folder: Path, text: str) -> Path:
    (folder / CONFIG_NAME).write_text(text)
    return folder


def test_every_field_of_peft_is_known() -> None:
    """A field is read, harmless or refused; a new one in PEFT shows here."""
    known = AdapterConfig.model_fields.keys() | HARMLESS | REFUSED.keys()
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= known


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_a_field_that_changes_the_meaning_is_refused_by_name(field: str) -> None:
    """Set, it is a problem with a reason; null or false, it is none."""
    (problem,) = config_problems(parsed(**{field: [1]}))
    assert problem == f"{field}: {REFUSED[field]}"
    assert not list(config_problems(parsed(**{field: None})))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga"])
def test_an_init_that_changed_the_base_is_refused(init: str) -> None:
    """The saved base is not the one that the factors belong to."""
    (problem,) = config_problems(parsed(init_lora_weights=init))
    assert "changed the base's weights" in problem


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_an_init_of_the_factors_alone_is_taken(init: bool | str) -> None:
    """Training began elsewhere; the sum is the same."""
    assert not list(config_problems(parsed(init_lora_weights=init)))


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "IA3", "ADALORA", "PROMPT_TUNING"])
def test_other_kinds_of_adapters_are_refused(kind: str) -> None:
    """Only LORA is B @ A."""
    assert f"peft_type {kind}" in next(iter(config_problems(parsed(peft_type=kind))))


def test_a_field_that_nobody_knows_is_refused_where_it_is_set() -> None:
    """It may change everything."""
    assert not list(config_problems(parsed(use_tomorrow=False)))
    (problem,) = config_problems(parsed(use_tomorrow=True))
    assert problem.startswith("use_tomorrow: ")


def test_scaling_is_alpha_over_the_rank_or_its_root() -> None:
    """As PEFT's LoraLayer computes it."""
    assert parsed().scaling("q_proj") == 12 / 8
    assert parsed(use_rslora=True).scaling("q_proj") == 12 / math.sqrt(8)


PATTERNS = ("q_proj", "layers.1.self_attn.q_proj", r"^model.*q_proj", r".*\.(1|2)\..*proj", "proj")
MODULES = st.lists(
    st.sampled_from(["model", "layers", "1", "11", "self_attn", "q_proj"]), min_size=1
)


@given(st.lists(st.sampled_from(PATTERNS), unique=True), MODULES.map(".".join))
def test_patterns_match_as_peft_matches_them(patterns: list[str], module: str) -> None:
    """The first that is a suffix after a dot, as a regular expression."""
    ranks = {pattern: number + 1 for number, pattern in enumerate(patterns)}
    expected = ranks.get(get_pattern_key(ranks.keys(), module), 8)
    assert parsed(rank_pattern=ranks).rank(module) == expected
    alphas = {pattern: float(rank) for pattern, rank in ranks.items()}
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), 12)
    assert parsed(alpha_pattern=alphas).scaling(module) == alpha / 8


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "a*" * 30, "(a|a)" * 30, "(a?)" * 20, "a" * 2000, "("]
)
def test_a_pattern_that_could_hang_is_refused(tmp_path: Path, pattern: str) -> None:
    """Adapters come from strangers, and Python's matcher has no time limit."""
    folder = written(tmp_path, json.dumps(PLAIN | {"rank_pattern": {pattern: 4}}))
    with pytest.raises(CheckpointError, match="rank_pattern"):
        read_config(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"peft_type": "LORA", "peft_type": "LORA", "r": 1, "lora_alpha": 1}',
        '{"peft_type": "LORA", "r": 0, "lora_alpha": 1}',
        '{"peft_type": "LORA", "r": true, "lora_alpha": 1}',
        '{"peft_type": "LORA", "r": 1, "lora_alpha": NaN}',
        '{"peft_type": "LORA", "r": 1}',
    ],
)
def test_what_peft_never_wrote_is_refused(tmp_path: Path, text: str) -> None:
    """No JSON, no object, doubled names, types and numbers that no adapter has."""
    with pytest.raises(CheckpointError, match="no configuration of a LoRA adapter"):
        read_config(written(tmp_path, text))


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    """And what would have to be in it."""
    with pytest.raises(CheckpointNotFoundError, match=r"adapter_model\.safetensors"):
        read_config(tmp_path / "none")
