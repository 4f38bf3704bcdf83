"""vllm_rvec.vector.compatibility.dialable: what files say against a dial."""

from __future__ import annotations

import pytest

from vllm_rvec.vector.compatibility.dialable import DIALABLE, dial_problem

DENSE = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"]
EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"
ROUTER = "model.layers.0.mlp.gate.weight"


@pytest.mark.parametrize("model_type", sorted(DIALABLE))
def test_nothing_speaks_against_a_family_that_was_compared(model_type: str) -> None:
    """With a vector of its plain matrices."""
    assert not dial_problem({"model_type": model_type}, DENSE)


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": "brand_new"}])
def test_another_family_is_named(config: dict[str, object]) -> None:
    """Also where config.json does not say which it is."""
    assert repr(config.get("model_type")) in dial_problem(config, DENSE)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ([EXPERT], "changes experts"),
        ([ROUTER], "changes router"),
        ([*DENSE, ROUTER, EXPERT], "changes experts and router"),
    ],
)
def test_a_vector_of_a_mixtures_experts_is_out(changed: list[str], words: str) -> None:
    """Also where it changes other things as well; without them the same model is fine."""
    assert words in dial_problem({"model_type": "qwen3_moe"}, changed)
    assert not dial_problem({"model_type": "qwen3_moe"}, DENSE)
