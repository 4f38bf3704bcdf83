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
    """On straight lines; what is in no layer takes the first number, as mergekit has it."""
    found = alphas(alpha=gradient)
    assert [of_layer(found, layer) for layer in range(LAYERS)] == pytest.approx(expected)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert found[name] == gradient[0]


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
    with pytest.raises(ConfigError, match=r"layer 5 is not there: the vector has layers 0-4"):
        alphas(layers="3-5")


def test_one_layer_is_written_as_a_number_too() -> None:
    """YAML reads `layers: 3` so."""
    assert alphas(layers=3) == alphas(layers="3")
    with pytest.raises(ValidationError, match="valid string"):
        RecipeVector.model_validate({"path": "v", "layers": True})


def test_layers_that_only_some_vectors_have_are_named() -> None:
    """A vector may cover few layers; nothing is left out without a word."""
    few = [name for name in NAMES if ".layers.1." in name or ".layers.3." in name]
    assert len(tensor_alphas(RecipeVector(path="v", layers="3"), few)) == 6
    with pytest.raises(ConfigError, match=r"layer 2 is not there: the vector has layers 1,3"):
        tensor_alphas(RecipeVector(path="v", layers="1-3"), few)
    with pytest.raises(ConfigError, match="layer 0 is not there: the vector has no layers"):
        tensor_alphas(RecipeVector(path="v", layers="0"), ["lm_head.weight"])


def test_a_gradient_needs_to_know_all_layers() -> None:
    """A vector that says nothing of some may end before the model does."""
    said = RecipeVector(path="v", alpha={"mlp": [0, 1], "default": 0.5})
    with pytest.raises(ConfigError, match="can't be added by a gradient") as caught:
        tensor_alphas(said, NAMES, is_complete=False)
    assert "its last layer is 4" in str(caught.value)
    for alpha in (0.5, [0.5], {"attention": 0.5, "default": 1}):
        said = RecipeVector.model_validate({"path": "v", "alpha": alpha})
        assert tensor_alphas(said, NAMES, is_complete=False) == tensor_alphas(said, NAMES)


def test_every_stack_of_layers_has_the_whole_gradient() -> None:
    """A vision tower is deeper or shallower than the language model beside it."""
    towers = [f"vision.layers.{layer}.mlp.fc1.weight" for layer in range(9)]
    found = tensor_alphas(RecipeVector(path="v", alpha=[0, 1]), [*NAMES, *towers])
    assert of_layer(found, LAYERS - 1) == found[towers[-1]] == 1
    assert of_layer(found, 2) == found[towers[4]] == 0.5


def test_the_only_layer_takes_the_last_number() -> None:
    """As mergekit has it."""
    assert tensor_alphas(RecipeVector(path="v", alpha=[0.2, 0.7]), ["h.0.w"]) == {"h.0.w": 0.7}


def test_layers_and_patterns_that_leave_nothing_are_refused() -> None:
    """Each of them matches something; together they would add nothing."""
    with pytest.raises(ConfigError, match="layers 1 of v hold nothing that its patterns leave"):
        alphas(layers="1", include=["*embed*"])


def test_an_alpha_for_what_is_not_there_is_refused() -> None:
    """Three matrices have no alpha as one, and a dense model has no experts."""
    with pytest.raises(ConfigError, match="for what the vector does not have") as caught:
        alphas(alpha={"qkv": 0.5, "experts": 0, "default": 1})
    assert caught.value.problems == ("qkv", "experts")
    assert "down, embedding, gate, head, norms, o, q" in caught.value.why


@pytest.mark.parametrize(
    "said",
    [
        {"include": ["*.selfattn.*"]},
        {"layers": "9"},
        {"layers": "1", "include": ["*embed*"]},
        {"alpha": {"experts": 1}},
        {"alpha": {"mlp": 1}},
    ],
    ids=str,
)
def test_messages_name_the_vector_and_no_secret(said: dict[str, Any]) -> None:
    """A recipe has several, and a URL may be signed."""
    vector = RecipeVector(path="https://me:sesame@host.test/v?sig=sesame", **said)
    with pytest.raises(ConfigError, match=r"https://host\.test/v") as caught:
        tensor_alphas(vector, NAMES)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"],
        [
            "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
            "model.layers.0.self_attn.q_b_proj.weight",
            "model.layers.0.mlp.shared_experts.up_proj.weight",
        ],
        [
            "model.layers.0.self_attn.sinks",
            "model.layers.0.mlp.experts.gate_up_proj_bias",
            "model.layers.0.mlp.router.bias",
        ],
        [
            "model.layers.0.self_attn.v_proj.bias",
            "model.layers.0.block_sparse_moe.experts.3.w2.weight",
            "model.layers.0.block_sparse_moe.gate.weight",
        ],
        ["h.0.attn.c_attn.bias", "h.0.attn.c_proj.weight", "h.0.mlp.c_proj.weight"],
    ],
    ids=["phi3", "deepseek", "gpt-oss", "mixtral", "gpt2"],
)
def test_attention_and_mlp_are_all_of_a_layer_but_its_norms(names: list[str]) -> None:
    """In every family: no tensor of either is left to `default`."""
    found = tensor_alphas(RecipeVector(path="v", alpha={"attention": 2, "mlp": 3}), names)
    assert found == {name: 2 if "attn" in name else 3 for name in names}


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
