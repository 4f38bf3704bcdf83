"""vllm_rvec.vector.derive.selection: patterns on names."""

from __future__ import annotations

import pytest

from vllm_rvec.errors import ConfigError
from vllm_rvec.vector.derive.selection import select_names

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.mlp.{kind}_proj.weight" for i in range(12) for kind in ("up", "down")),
    *(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(12)),
]


def test_without_patterns_all_are_selected() -> None:
    """Nothing is left out unasked."""
    assert select_names(NAMES) == set(NAMES)


def test_one_of_several_patterns_suffices() -> None:
    """--include may be given several times."""
    found = select_names(NAMES, include=["*.q_proj.*", "*embed*"])
    assert found == {n for n in NAMES if "q_proj" in n or "embed" in n}


def test_exclude_goes_before_include() -> None:
    """What both match is left out."""
    found = select_names(NAMES, include=["*.mlp.*"], exclude=["*.layers.1.*", "*.up_proj.*"])
    assert found == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(12) if i != 1}


def test_case_counts() -> None:
    """As in names of tensors, on every system."""
    with pytest.raises(ConfigError):
        select_names(NAMES, include=["*.MLP.*"])


def test_patterns_that_match_nothing_are_all_named_with_near_names() -> None:
    """A typing error would else give a vector of nothing; layers are one kind in the answer."""
    with pytest.raises(ConfigError) as caught:
        select_names(NAMES, include=["*.q_prj.*", "*.mlp.*"], exclude=["lm_head.weight"])
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "*.q_prj.*",
        "lm_head.weight",
    ]
    assert "model.layers.*.self_attn.q_proj.weight" in caught.value.problems[0]
    assert "model.layers.10" not in str(caught.value)


def test_patterns_that_leave_nothing_are_refused() -> None:
    """A vector of zeros only is nobody's wish."""
    with pytest.raises(ConfigError, match="leave no tensor"):
        select_names(NAMES, include=["*.mlp.*"], exclude=["*"])


def test_a_vector_without_tensors_says_so() -> None:
    """No near names then."""
    with pytest.raises(ConfigError, match="has no tensors"):
        select_names([], include=["*"])
