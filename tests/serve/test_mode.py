"""Fused or dial: what decides it, and what is said of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from vllm_rvec.errors import CheckpointError, ConfigError
from vllm_rvec.serve import ServeConfig, choose_mode, load_config, model_facts
from vllm_rvec.serve.mode import ModelFacts

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family

QWEN = ModelFacts({"model_type": "qwen2"}, frozenset({"model.layers.0.mlp.up_proj.weight"}))
STRANGE = ModelFacts({"model_type": "strange"}, QWEN.changed)
ON_THE_HUB = ModelFacts(None, QWEN.changed)
PAIR = {"vectors": [{"path": "a/reasoning"}, {"path": "b", "name": "style"}]}
BOTH = {"both": {"alpha": {"reasoning": 0.5, "style": 1}}}


def config(**settings: Any) -> ServeConfig:
    vector = {} if "vectors" in settings else {"vector": "v"}
    return load_config(None, {"model": "m", **vector, **settings})


def variants(*alphas: float) -> dict[str, Any]:
    return {f"v{at}": {"alpha": alpha} for at, alpha in enumerate(alphas)}


def refusal(settings: ServeConfig, *flags: str, facts: ModelFacts | None = QWEN) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        choose_mode(settings, flags, facts)
    return caught.value


def test_several_alphas_get_a_dial() -> None:
    """The default ones, too; the line says how to have it otherwise."""
    choice = choose_mode(config(), (), QWEN)
    assert choice.mode == "dial"
    assert choice.reason == (
        "one engine for 2 alphas and any other in -1:2; --mode fused starts one for each"
    )


@pytest.mark.parametrize("alphas", [(0.5,), (0.5, 0.5), (0.0, -0.0)])
def test_one_alpha_is_fused(alphas: tuple[float, ...]) -> None:
    """However many names it has. A dial of one alpha must be asked for."""
    choice = choose_mode(config(variants=variants(*alphas)), (), QWEN)
    assert choice.mode == "fused"
    assert "--mode dial" in choice.reason
    asked = config(variants=variants(*alphas), mode="dial")
    assert choose_mode(asked, (), QWEN).mode == "dial"


def test_fused_as_asked() -> None:
    """Nothing is looked at."""
    assert choose_mode(config(mode="fused"), ("--enable-lora",), None).mode == "fused"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (STRANGE, "models of type 'strange' have not been tried"),
        (ON_THE_HUB, "config.json of a Hub id is not at hand; --mode dial asks for it"),
        (ModelFacts({"model_type": "mixtral"}, frozenset({"layers.0.experts.1.w1"})), "experts"),
    ],
)
def test_a_model_that_rules_it_out_is_fused(facts: ModelFacts, words: str) -> None:
    """With what it was."""
    choice = choose_mode(config(), (), facts)
    assert choice.mode == "fused"
    assert words in choice.reason


RULING_OUT = [
    (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size"),
    (["--pipeline_parallel_size=4"], "--pipeline-parallel-size"),
    (["-pp", "2"], "--pipeline-parallel-size"),
    (["-pp=2"], "--pipeline-parallel-size"),
    (["--data-parallel-size", "2"], "--data-parallel-size"),
    (["-dp", "2"], "--data-parallel-size"),
    (["--speculative-config", "{}"], "--speculative-config"),
    (["--speculative-config.method", "ngram"], "--speculative-config"),
    (["-sc", "{}"], "--speculative-config"),
    (["--spec-model", "x"], "--spec-model"),
    (["--enable-lora"], "--enable-lora"),
    (["--worker-cls", "x"], "--worker-cls"),
    (["--scheduler-cls", "x"], "--scheduler-cls"),
]


@pytest.mark.parametrize(("flags", "named"), RULING_OUT)
def test_a_flag_that_rules_it_out(flags: list[str], named: str) -> None:
    """Is a reason for auto, and an error where the dial was asked for."""
    choice = choose_mode(config(), flags, QWEN)
    assert choice.mode == "fused"
    assert named + ":" in choice.reason
    (problem,) = refusal(config(mode="dial"), *flags).problems
    assert problem.startswith(named + ":")


@pytest.mark.parametrize(
    "flags",
    [
        ["-pp", "1", "--data-parallel-size=1"],
        ["--worker-extension-cls", "x"],
        ["--logits-processors", "x", "--middleware", "y"],
        ["--no-enable-lora"],
        ["-tp", "2", "--max-model-len", "4096"],
    ],
)
def test_flags_that_a_dial_can_have(flags: list[str]) -> None:
    """They rule nothing out."""
    assert choose_mode(config(), flags, QWEN).mode == "dial"


def test_configured_flags_count_as_well() -> None:
    """From YAML."""
    assert choose_mode(config(engine={"enable-lora": True}), (), QWEN).mode == "fused"
    assert choose_mode(config(engine={"enable-lora": False}), (), QWEN).mode == "dial"


def test_a_dial_that_can_not_be_had_says_all_at_once() -> None:
    """Each reason a line, and the ways out."""
    error = refusal(config(mode="dial"), "--enable-lora", "-pp", "2", facts=STRANGE)
    assert [problem.split(":")[0] for problem in error.problems[:2]] == [
        "--enable-lora",
        "--pipeline-parallel-size",
    ]
    assert "'strange'" in error.problems[2]
    assert "--mode fused" in error.fix
    assert "leave the flags out and try it with --force" in error.fix
    assert refusal(config(mode="dial"), facts=STRANGE).fix.endswith("or try it with --force")
    assert refusal(config(mode="dial"), "-pp", "2").fix.endswith("or leave these flags out")


def test_a_dial_can_be_forced_on_a_model_but_not_on_flags() -> None:
    """The model may do well; two workers in one place can't."""
    forced = config(mode="dial", force=True)
    choice = choose_mode(forced, (), STRANGE)
    assert choice.mode == "dial"
    assert "forced, though models of type 'strange'" in choice.reason
    assert len(refusal(forced, "--worker-cls", "x", facts=STRANGE).problems) == 1


def test_force_alone_does_not_choose_a_dial() -> None:
    """It is for more than that."""
    assert choose_mode(config(force=True), (), STRANGE).mode == "fused"


def test_a_hub_id_gets_the_dial_that_is_asked_for() -> None:
    """The engine has the last word."""
    assert choose_mode(config(mode="dial"), (), ON_THE_HUB).mode == "dial"


@pytest.mark.parametrize(
    "settings",
    [
        {**PAIR, "variants": BOTH},
        {"variants": variants(1), "alpha_range": "0:1"},
        {"variants": variants(1), "vector_dtype": "int8"},
    ],
)
def test_settings_that_only_a_dial_has(settings: dict[str, Any]) -> None:
    """They ask for one; fused engines refuse them, and nothing drops them without a word."""
    assert choose_mode(config(**settings), (), QWEN).mode == "dial"
    assert choose_mode(config(**settings), (), ON_THE_HUB).mode == "dial"
    error = refusal(config(**settings), facts=STRANGE)
    assert "it is asked for by `" in error.why
    assert "without the settings that only a dial has" in error.fix
    error = refusal(config(mode="fused", **settings))
    assert len(error.problems) == 1
    assert "use --mode dial" in error.fix


def test_before_files_are_read_flags_decide() -> None:
    """What is wrong there is said before a vector is fetched."""
    assert choose_mode(config()).mode == "dial"
    with pytest.raises(ConfigError, match="--enable-lora"):
        choose_mode(config(mode="dial"), ["--enable-lora"])


def test_the_facts_of_files(family: Family, vector: Path) -> None:
    """config.json, and what the vector changes."""
    settings = load_config(None, {"model": str(family.target), "vector": str(vector)})
    facts = model_facts(settings)
    assert facts.config is not None
    assert facts.config["model_type"] == "qwen2"
    assert "model.layers.0.mlp.up_proj.weight" in facts.changed
    assert choose_mode(settings, (), facts).mode == "dial"
    assert model_facts(settings.model_copy(update={"model": "owner/model"})).config is None


def test_tensors_that_a_recipe_leaves_out_are_not_changed(family: Family, vector: Path) -> None:
    """By its patterns, or by an alpha of 0."""
    said = {"path": str(vector), "include": ["*.mlp.*"], "alpha": {"down": 0, "default": 1}}
    settings = load_config(None, {"model": str(family.target), "vectors": [said]})
    names = {name.rsplit(".", 2)[1] for name in model_facts(settings).changed}
    assert names == {"gate_proj", "up_proj"}


def test_a_target_without_a_configuration(vector: Path, tmp_path: Path) -> None:
    """As the check of files says it."""
    settings = load_config(None, {"model": str(tmp_path), "vector": str(vector)})
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        model_facts(settings)
