"""vllm_rvec.vector.recipe: one number for each tensor, read as mergekit reads gradients."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from vllm_rvec.errors import ConfigError
from vllm_rvec.vector.recipe import RecipeVector, tensor_alphas

LAYERS = 5
NAMES = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{layer}.{module}"
        for layer in range(LAYERS)
        for module in (
            "self_attn.q_proj.weight",
            "self_attn.q_proj.bias",
            "self_attn.o_proj.weight",
            "mlp.gate_proj.weight",
            "mlp.down_proj.weight",
            "input_layernorm.weight",
        )
    ),
    "model.norm.weight",
    "lm_head.weight",
]


def alphas(**said: Any) -> dict[str, float]:
    return tensor_alphas(RecipeVector(path="v", **said), NAMES)


def of_layer(found: dict[str, float], layer: int, module: str = "mlp.down_proj.weight") -> float:
    return found[f"model.layers.{layer}.{module}"]


def test_one_number_is_every_tensors() -> None:
    """Without anything else, all of the vector is added."""
    assert alphas() == dict.fromkeys(NAMES, 1.0)
    assert alphas(alpha=-0.5) == dict.fromkeys(NAMES, -0.5)


@pytest.mark.parametrize(
    ("gradient", "expected"),
    [
        ([0, 1], [0, 0.25, 0.5, 0.75, 1]),
        ([0, 1, 0], [0, 0.5, 1, 0.5, 0]),
        ([0.3], [0.3] * 5),
        ([0, 0.5, 0.5, 1], [0, 0.375, 0.5, 0.625, 1]),
    ],
)
def test_a_gradient_is_spread_over_the_layers(gradient: list[float], expected: list[float]) -> None:
    """On straight lines; what is before and behind the layers takes the ends."""
    found = alphas(alpha=gradient)
    assert [of_layer(found, layer) for layer in range(LAYERS)] == pytest.approx(expected)
    assert found["model.embed_tokens.weight"] == gradient[0]
    assert found["model.norm.weight"] == found["lm_head.weight"] == gradient[-1]


def test_kinds_of_module_have_alphas_of_their_own() -> None:
    """A single kind goes before its group, and a bias goes with its weight."""
    found = alphas(alpha={"attention": 0.5, "q": 2, "mlp": [0, 1], "default": 0})
    assert of_layer(found, 3, "self_attn.q_proj.weight") == 2
    assert of_layer(found, 3, "self_attn.q_proj.bias") == 2
    assert of_layer(found, 3, "self_attn.o_proj.weight") == 0.5
    assert of_layer(found, 1, "mlp.gate_proj.weight") == 0.25
    assert of_layer(found, 1, "input_layernorm.weight") == 0
    assert found["lm_head.weight"] == 0


def test_kinds_that_are_not_named_are_asked_for() -> None:
    """0 and 1 would both be a guess."""
    with pytest.raises(ConfigError, match="says nothing of 3 kinds of module") as caught:
        alphas(alpha={"attention": 1, "mlp": 1})
    assert caught.value.problems == ("embedding", "head", "norms")


def test_kinds_that_the_recipe_leaves_out_need_no_alpha() -> None:
    """Layers and patterns are taken first."""
    found = alphas(alpha={"mlp": 0.5}, include=["*.mlp.*"], layers="1-2")
    assert len(found) == 4
    assert set(found.values()) == {0.5}


@pytest.mark.parametrize(
    ("layers", "expected"), [("1-3", {1, 2, 3}), ("0,4", {0, 4}), (" 0 - 1 , 3", {0, 1, 3})]
)
def test_layers_have_both_ends_and_nothing_else(layers: str, expected: set[int]) -> None:
    """Embedding, last norm and head are in no layer."""
    found = alphas(layers=layers)
    assert {int(name.split(".")[2]) for name in found} == expected
    assert len(found) == 6 * len(expected)


def test_a_layer_that_is_not_there_is_named() -> None:
    """Most often a range that was meant without its end."""
    with pytest.raises(ConfigError, match=r"layer 5 is not there: the vector has layers 0 to 4"):
        alphas(layers="3-5")


def test_patterns_choose_names() -> None:
    """As the commands' --include and --exclude do."""
    found = alphas(include=["*.self_attn.*"], exclude=["*.bias"])
    assert len(found) == 2 * LAYERS
    with pytest.raises(ConfigError, match="matches no tensor"):
        alphas(include=["*.selfattn.*"])


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"alpha": "x"}, "should be a number, a list of numbers, or a mapping"),
        ({"alpha": True}, "should be a number"),
        ({"alpha": []}, "should be a number"),
        ({"alpha": [0, "x"]}, "should be a number"),
        ({"alpha": float("nan")}, "nan is not finite"),
        ({"alpha": [1e39]}, "1e\\+39 is beyond the range of float32"),
        ({"alpha": {"attenton": 1}}, "no kind of module: attenton; there are attention, mlp, q"),
        ({"alpha": {"biases": 1}}, "no kind of module: biases"),
        ({"alpha": {}}, "no kind of module"),
        ({"layers": "5-3"}, "'5-3' is no layer or range of layers"),
        ({"layers": "a"}, "write 8-20 or 0-3,8"),
        ({"path": ""}, "at least 1 character"),
        ({"weight": 1}, "Extra inputs"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line(said: dict[str, Any], problem: str) -> None:
    """Not once for each form that alpha may have."""
    with pytest.raises(ValidationError, match=problem) as caught:
        RecipeVector(**{"path": "v", **said})
    assert caught.value.error_count() == 1
