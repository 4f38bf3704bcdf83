"""vllm_rvec.loader.config: the loader's keys."""

from __future__ import annotations

from typing import get_args

import pytest

from vllm_rvec.errors import ConfigError
from vllm_rvec.loader.config import LoaderConfig
from vllm_rvec.loader.formats import BASE_FORMATS, REFUSED_FORMATS, VLLM_KEYS
from vllm_rvec.loader.placement import FuseOn
from vllm_rvec.vector.compatibility.structure import VOCABULARY_POLICIES


def test_our_keys_and_vllms_are_told_apart() -> None:
    """The safetensors loader's own keys go through unchanged."""
    extra = {"vector": "v", "alpha": 0.5, "enable_multithread_load": True, "num_threads": 4}
    config, vllm_keys = LoaderConfig.split(extra)
    assert (config.vector, config.alpha) == ("v", 0.5)
    assert vllm_keys == {"enable_multithread_load": True, "num_threads": 4}
    assert set(vllm_keys) <= set(VLLM_KEYS)


def test_alpha_is_one_where_it_is_not_given() -> None:
    """As in the paper's experiments; a whole number is as good as a fraction."""
    assert LoaderConfig.split({"vector": "v"})[0].alpha == 1.0
    assert LoaderConfig.split({"vector": "v", "alpha": -1})[0].alpha == -1.0


def test_all_mistakes_are_named_at_once() -> None:
    """Unknown keys by name, and what is missing or wrong."""
    with pytest.raises(ConfigError) as caught:
        LoaderConfig.split({"vektor": "v", "alpha": "much", "beta": 1})
    text = str(caught.value)
    for part in ("unknown key 'vektor'", "unknown key 'beta'", "'vector' is missing", "alpha: "):
        assert part in text
    assert "the keys are: vector, vectors, alpha, vocabulary, force, mode, alpha_range" in text


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 1e39, 1e-45, "1", True, None])
def test_an_alpha_that_is_no_finite_number_is_refused(alpha: object) -> None:
    """Also the text "1" and true, which YAML and JSON make easy to write."""
    with pytest.raises(ConfigError, match="alpha"):
        LoaderConfig.split({"vector": "v", "alpha": alpha})


def test_where_a_gpu_adds_is_one_of_three() -> None:
    """Left alone, it is measured."""
    assert LoaderConfig.split({"vector": "v"})[0].fuse_on == "auto"
    assert LoaderConfig.split({"vector": "v", "fuse_on": "device"})[0].fuse_on == "device"
    assert get_args(LoaderConfig.model_fields["fuse_on"].annotation) == get_args(FuseOn)
    with pytest.raises(ConfigError, match=r"fuse_on: .*'auto', 'host' or 'device'"):
        LoaderConfig.split({"vector": "v", "fuse_on": "gpu"})


def test_a_policy_is_one_of_three_and_force_is_true_or_false() -> None:
    """By default nothing is forced and every row must match."""
    config = LoaderConfig.split({"vector": "v"})[0]
    assert (config.vocabulary, config.force) == ("strict", False)
    config = LoaderConfig.split({"vector": "v", "vocabulary": "common", "force": True})[0]
    assert (config.vocabulary, config.force) == ("common", True)
    with pytest.raises(ConfigError) as caught:
        LoaderConfig.split({"vector": "v", "vocabulary": "some", "force": "yes"})
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["vocabulary", "force"]
    assert set(get_args(LoaderConfig.model_fields["vocabulary"].annotation)) == set(
        VOCABULARY_POLICIES
    )


def test_something_other_than_an_object_is_refused() -> None:
    """The message shows how to write it."""
    with pytest.raises(ConfigError, match="must be a JSON object"):
        LoaderConfig.split(["v"])


@pytest.mark.parametrize("name", REFUSED_FORMATS)
def test_a_format_without_a_stream_of_tensors_is_refused_with_its_reason(name: str) -> None:
    """Dummy weights, pickles, vLLM's own sharded files, a cache that does not know alpha."""
    with pytest.raises(ConfigError) as caught:
        LoaderConfig.split({"vector": "v", "base_format": name})
    assert REFUSED_FORMATS[name] in caught.value.problems[0]
    assert "the formats are: safetensors, runai_streamer" in caught.value.problems[0]


@pytest.mark.parametrize("base_format", BASE_FORMATS)
def test_each_format_takes_its_own_keys_alone(base_format: str) -> None:
    """Others of vLLM's keys are named with the format that has them."""
    given = {"vector": "v", "base_format": base_format}
    for key in VLLM_KEYS:
        if key in BASE_FORMATS[base_format]:
            assert LoaderConfig.split(given | {key: 1})[1] == {key: 1}
            continue
        with pytest.raises(ConfigError, match=f"{key}: of ") as caught:
            LoaderConfig.split(given | {key: 1})
        assert f"keys that base_format {base_format} does not have" in str(caught.value)


def test_a_dial_has_names_for_its_vectors_and_alphas_for_its_variants() -> None:
    """Vectors are called as their folders are; a mapping leaves the others at 0."""
    extra = {
        "mode": "dial",
        "vectors": [{"path": "x/reasoning"}, {"path": "y/v2", "name": "style"}],
        "variants": {"base": 0, "mixed": {"style": 0.5}},
        "alpha_range": [0, 1],
    }
    dial = LoaderConfig.split(extra)[0].dial
    assert dial.vectors == ("reasoning", "style")
    assert dial.variants == {"base": (0, 0), "mixed": (0, 0.5)}
    assert dial.allowed == (0, 1)


def test_requests_that_say_nothing_get_alpha_or_the_first_variant() -> None:
    """So that `served-model-name`, the first variant's in `serve`, is what it says."""
    dial = {"vector": "v", "mode": "dial"}
    variants = {"variants": {"low": 0.25, "high": 1}}
    assert LoaderConfig.split(dial)[0].default_alphas == (1.0,)
    assert LoaderConfig.split(dial | variants)[0].default_alphas == (0.25,)
    assert LoaderConfig.split(dial | variants | {"alpha": 0.5})[0].default_alphas == (0.5,)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"alpha_range": [1, 0]}, "alpha_range"),
        ({"variants": {"x": {"who": 1}}}, "who"),
        ({"mode": "both"}, "mode"),
        ({"vector_dtype": "int4"}, "vector_dtype"),
        ({"alpha_range": [0, 1e40]}, "alpha_range"),
    ],
)
def test_what_a_dial_cant_be_is_named(wrong: dict[str, object], says: str) -> None:
    """Ranges, variants of vectors that are not there, other words."""
    with pytest.raises(ConfigError, match=says):
        LoaderConfig.split({"vector": "v", "mode": "dial", **wrong})
