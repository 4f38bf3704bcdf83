"""The plan is what vLLM will be given, word for word."""

from __future__ import annotations

import json
import sys
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import pytest

from vllm_rvec.errors import ConfigError
from vllm_rvec.loader.config import LoaderConfig
from vllm_rvec.serve import EngineSpec, ServeConfig, Variant, load_config, plan_engines
from vllm_rvec.serve.config import variants_from_alphas
from vllm_rvec.vector.dial import AlphaRequestError

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS = {"vector": "v", "alpha": 1.0, "vocabulary": "strict", "force": False}
FRONT = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]


def config(*alphas: float, **settings: object) -> ServeConfig:
    variants = variants_from_alphas(alphas or (1.0,))
    return load_config(None, {"model": "m", "vector": "v", "variants": variants, **settings})


SERVER_WORDS = (
    *("--shutdown-timeout", "30"),
    *("--disable-access-log-for-endpoints", "/health"),
)


def plan_one(*extra_args: str, **settings: object) -> EngineSpec:
    (spec,) = plan_engines(config(**settings), extra_args, environ={})
    return spec


def after(spec: EngineSpec, flag: str) -> str:
    return spec.argv[spec.argv.index(flag) + 1]


def test_one_variant_is_one_engine() -> None:
    """The whole command, without host and port."""
    spec = plan_one()
    assert list(spec.argv) == [
        *FRONT,
        *("--model", "m", "--served-model-name", "enhanced@1", "--load-format", "rvec"),
        *("--model-loader-extra-config", json.dumps(OPTIONS)),
        *SERVER_WORDS,
    ]
    assert (spec.name, spec.variants) == ("enhanced@1", (Variant("enhanced@1", 1.0),))


def test_engines_share_the_memory() -> None:
    """Together they take 0.9 of it, rounded down."""
    shares = [
        after(plan_engines(config(*range(count)), environ={})[0], "--gpu-memory-utilization")
        for count in (2, 3, 4, 7)
    ]
    assert shares == ["0.45", "0.3", "0.225", "0.128"]


@pytest.mark.parametrize(
    ("extra_args", "settings", "environ"),
    [
        (["--gpu-memory-utilization", "0.3"], {}, {}),
        (["--gpu_memory_utilization=0.3"], {}, {}),
        (["--kv-cache-memory-bytes", "1G"], {}, {}),
        ([], {"engine": {"kv-cache-memory-bytes": 1}}, {}),
        ([], {"env": {"VLLM_CPU_KVCACHE_SPACE": "1"}}, {}),
        ([], {}, {"VLLM_CPU_KVCACHE_SPACE": "1"}),
    ],
)
def test_memory_that_the_user_divides_stays_divided(
    extra_args: list[str], settings: dict[str, object], environ: dict[str, str]
) -> None:
    """Any of vLLM's three ways to say it counts."""
    specs = plan_engines(config(0, 1, **settings), extra_args, environ=environ)
    theirs = [word for word in extra_args if "utilization" in word]
    assert [w for w in specs[0].argv if "utilization" in w] == theirs


def test_configured_flags_become_words() -> None:
    """Each kind of YAML value, in the file's order; the user's own come last and so win."""
    flags = {
        "max_model_len": 512,
        "enforce-eager": True,
        "enable-prefix-caching": False,
        "middleware": ["a", "b"],
        "speculative-config": {"method": "ngram"},
        "seed": 1.5,
    }
    spec = plan_one("--max-model-len", "256", engine=flags)
    assert list(spec.argv[spec.argv.index("/health") + 1 :]) == [
        *("--max-model-len", "512", "--enforce-eager", "--no-enable-prefix-caching"),
        *("--middleware", "a", "b", "--speculative-config", '{"method": "ngram"}'),
        *("--seed", "1.5", "--max-model-len", "256"),
    ]


def test_a_shutdown_timeout_of_the_users_stays() -> None:
    """Ours only fills the gap, in which vLLM would abort requests at once."""
    assert after(plan_one(drain_seconds=7), "--shutdown-timeout") == "7"
    assert plan_one("--shutdown-timeout=3").argv.count("--shutdown-timeout") == 0


def test_flags_of_ours_are_refused_all_at_once() -> None:
    """From the file and the command line, however they are spelled; with what to do instead."""
    settings = config(engine={"model": "x", "load_format": "auto"})
    extra = ["--host", "h", "--port=1", "--served_model_name", "n", "--api-key=sekrit", "--uds=s"]
    with pytest.raises(ConfigError) as caught:
        plan_engines(settings, extra)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "--model (under `engine`)",
        "--load-format (under `engine`)",
        "--host (after `--`)",
        "--port (after `--`)",
        "--served-model-name (after `--`)",
        "--api-key (after `--`)",
        "--uds (after `--`)",
    ]
    assert "set `api_key`" in str(caught.value)
    assert "sekrit" not in str(caught.value)


@pytest.mark.parametrize(
    "word", ["--por", "--load-f=auto", "--served-model", "--config", "--ssl-keyfile"]
)
def test_shortened_and_indirect_flags_of_ours_are_refused(word: str) -> None:
    """An argument parser takes an unambiguous beginning, and --config holds any flag."""
    with pytest.raises(ConfigError, match="not yours to give"):
        plan_one(word, "x")


def test_flags_that_only_resemble_ours_pass() -> None:
    """--model-impl is not --model."""
    words = ["--model-impl", "auto", "--tokenizer", "--", "-tp", "2", "--config-format=auto"]
    assert list(plan_one(*words).argv[-7:]) == words


def test_a_word_that_is_no_flag_is_refused_in_front() -> None:
    """As vLLM would take it for the model."""
    with pytest.raises(ConfigError, match="'other-model'"):
        plan_one("other-model", "--seed", "1")


@pytest.mark.parametrize(
    "words",
    [
        ["--model-loader-extra-config", '{"key": 1}'],
        ['--model_loader_extra_config={"key": 1}'],
    ],
)
def test_loader_options_are_merged(words: list[str]) -> None:
    """As vLLM takes this flag once; ours and the user's keys go into the same."""
    spec = plan_one(*words, "--seed", "1")
    assert spec.argv.count("--model-loader-extra-config") == 1
    options = json.loads(after(spec, "--model-loader-extra-config"))
    assert options == {**OPTIONS, "key": 1}
    assert spec.argv[-2:] == ("--seed", "1")


def test_policy_and_force_reach_the_loader() -> None:
    """What the check allowed, the loader allows."""
    spec = plan_one(vocabulary="common", force=True)
    options = json.loads(after(spec, "--model-loader-extra-config"))
    assert options == {**OPTIONS, "vocabulary": "common", "force": True}


def test_a_recipe_reaches_the_loader_as_it_was_said() -> None:
    """What is not said is the loader's to fill in; the variant's alpha multiplies the whole."""
    vectors = [
        {"path": "a", "alpha": {"attention": 0.5, "default": [0, 1]}, "layers": "0-3,8"},
        {"path": "b", "include": ["*.mlp.*"]},
    ]
    variants = {"careful": {"alpha": 0.3}}
    settings = {"model": "m", "vectors": vectors, "variants": variants}
    (spec,) = plan_engines(load_config(None, settings), environ={})
    options = json.loads(after(spec, "--model-loader-extra-config"))
    assert options == {"vectors": vectors, "alpha": 0.3, "vocabulary": "strict", "force": False}
    loaded, _ = LoaderConfig.split(options)
    assert loaded.recipe == load_config(None, settings).recipe


def test_configured_loader_options_are_merged() -> None:
    """The same from YAML, as a mapping."""
    spec = plan_one(engine={"model-loader-extra-config": {"key": 1}})
    options = json.loads(after(spec, "--model-loader-extra-config"))
    assert options == {**OPTIONS, "key": 1}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--model-loader-extra-config", '{"alpha": 2, "vector": "x"}'], "alpha and vector: a set"),
        (["--model-loader-extra-config", '{"force": true}'], "force: a setting of"),
        (["--model-loader-extra-config", "{"], "not JSON"),
        (["--model-loader-extra-config"], "not JSON"),
        (["--model-loader-extra-config", "[1]"], "not a JSON object"),
        (["--model-loader-extra-config.alpha", "2"], "is not understood here"),
        (["--model-loader-extra", "{}"], "is not understood here"),
    ],
)
def test_other_loader_options_are_refused(words: list[str], why: str) -> None:
    """What could change alpha behind our back, or can't be merged."""
    with pytest.raises(ConfigError) as caught:
        plan_one(*words)
    assert why in caught.value.why


def test_each_engine_has_a_key_that_is_not_shown() -> None:
    """The key is new for each engine and in its environment only."""
    first, second = plan_engines(config(0, 1), environ={"VLLM_API_KEY": "of the parent"})
    assert first.api_key == first.env["VLLM_API_KEY"]
    assert len({first.api_key, second.api_key, "of the parent"}) == 3
    for spec in (first, second):
        assert len(spec.api_key) >= 32
        assert spec.api_key not in repr(spec)
        assert not any(spec.api_key in word for word in spec.argv)


def test_environments_are_layered() -> None:
    """The parent's, then the configuration's."""
    (spec,) = plan_engines(config(env={"B": "2"}), environ={"A": "1", "B": "1"})
    assert (spec.env["A"], spec.env["B"]) == ("1", "2")


def test_engines_do_not_get_the_key_that_clients_send() -> None:
    """They have keys of their own; a child's environment is easily read."""
    config = load_config(None, {"model": "m", "vector": "v"})
    specs = plan_engines(config, environ={"VLLM_RVEC_API_KEY": "sesame", "HOME": "/"})
    assert all("sesame" not in spec.env.values() for spec in specs)
    assert all(spec.env["HOME"] == "/" for spec in specs)


WORKER = "vllm_rvec.loader.worker.RvecWorker"


def plan_admin(*extra_args: str, environ: dict[str, str] | None = None) -> EngineSpec:
    (spec,) = plan_engines(config(admin_key="k"), extra_args, environ=environ or {})
    return spec


def test_an_admin_key_gives_engines_what_changes_alpha() -> None:
    """The plugin by its own name beside all that would load without it, and our workers."""
    spec = plan_admin()
    plugins = spec.env["VLLM_PLUGINS"].split(",")
    assert "rvec_admin" in plugins
    groups = ("general", "platform", "io_processor", "stat_logger")
    installed = [p.name for g in groups for p in entry_points(group=f"vllm.{g}_plugins")]
    assert {"rvec", *installed} == set(plugins) - {"rvec_admin"}
    assert after(spec, "--worker-extension-cls") == WORKER
    assert "k" not in spec.argv
    assert "VLLM_PLUGINS" not in plan_one().env
    assert "--worker-extension-cls" not in plan_one().argv


@pytest.mark.parametrize(
    ("given", "expected"),
    [("rvec", "rvec,rvec_admin"), ("rvec_admin,rvec", "rvec_admin,rvec"), ("", ",rvec_admin")],
)
def test_a_list_of_plugins_that_the_user_gave_is_kept(given: str, expected: str) -> None:
    """Ours is added; nothing else is let in."""
    assert plan_admin(environ={"VLLM_PLUGINS": given}).env["VLLM_PLUGINS"] == expected


def test_a_worker_class_of_the_users_own_is_kept() -> None:
    """The engine says itself if it does not inherit from ours."""
    spec = plan_admin("--worker-extension-cls", "my.Worker")
    assert spec.argv.count("--worker-extension-cls") == 1
    assert after(spec, "--worker-extension-cls") == "my.Worker"


def test_engines_never_see_the_admin_key() -> None:
    """Also where it came by the environment."""
    spec = plan_admin(environ={"VLLM_RVEC_ADMIN_KEY": "k"})
    assert "VLLM_RVEC_ADMIN_KEY" not in spec.env


def test_the_same_engine_at_another_alpha() -> None:
    """One word of its command changes; name, key and environment stay."""
    old = plan_one("--model-loader-extra-config", '{"num_threads": 2}')
    new = old.with_alpha(0.3)
    assert new.variants == (Variant("enhanced@1", 0.3),)
    assert new.env is old.env
    ((before, now),) = [(b, n) for b, n in zip(old.argv, new.argv, strict=True) if b != n]
    assert json.loads(now) == json.loads(before) | {"alpha": 0.3}
    assert json.loads(now)["num_threads"] == 2


DIAL_OPTIONS = {
    "vector": "v",
    "mode": "dial",
    "alpha_range": [-1.0, 2.0],
    "variants": {"base": 0.0, "enhanced@1": 1.0},
    "vector_dtype": "auto",
    "vocabulary": "strict",
    "force": False,
}
DIAL_WORDS = [
    *("--worker-cls", "vllm_rvec.loader.dial.worker.DialWorker"),
    *("--scheduler-cls", "vllm_rvec.loader.dial.scheduler.DialScheduler"),
    *("--logits-processors", "vllm_rvec.loader.dial.admission:AlphaAdmission"),
    *("--middleware", "vllm_rvec.loader.dial.middleware.DialMiddleware"),
]


def plan_dial(*extra_args: str, **settings: object) -> EngineSpec:
    (spec,) = plan_engines(config(0, 1, **settings), extra_args, mode="dial", environ={})
    return spec


def dial_options(**settings: object) -> dict[str, Any]:
    options: dict[str, Any] = json.loads(
        after(plan_dial(**settings), "--model-loader-extra-config")
    )
    return options


def test_a_dial_is_one_engine_for_all_variants() -> None:
    """The whole command; the first variant's name is the model's own."""
    spec = plan_dial()
    assert list(spec.argv) == [
        *FRONT,
        *("--model", "m", "--served-model-name", "base", "--load-format", "rvec"),
        *("--model-loader-extra-config", json.dumps(DIAL_OPTIONS)),
        *SERVER_WORDS,
        *DIAL_WORDS,
    ]
    assert spec.name == "dial"
    assert spec.variants == (Variant("base", 0.0), Variant("enhanced@1", 1.0))
    assert spec.env["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert spec.api_key


def test_a_dial_of_one_alpha() -> None:
    """The same with one name."""
    (spec,) = plan_engines(config(0.5), mode="dial", environ={})
    assert after(spec, "--served-model-name") == "enhanced@0.5"
    assert spec.variants == (Variant("enhanced@0.5", 0.5),)


def test_what_a_dial_is_told_of_vectors() -> None:
    """Range, form and names as they were said; the loader reads the same of it."""
    vectors = [{"path": "a/reasoning", "layers": "0-3"}, {"path": "b", "name": "style"}]
    settings = {
        "model": "m",
        "vectors": vectors,
        "variants": {"both": {"alpha": {"reasoning": 0.5}}, "base": {"alpha": 0}},
        "alpha_range": "0:0.5",
        "vector_dtype": "int8",
    }
    given = load_config(None, settings)
    (spec,) = plan_engines(given, mode="dial", environ={})
    options = json.loads(after(spec, "--model-loader-extra-config"))
    assert options == {
        "vectors": [{"path": "a/reasoning", "name": "reasoning", "layers": "0-3"}, vectors[1]],
        "mode": "dial",
        "alpha_range": [0.0, 0.5],
        "variants": {"both": {"reasoning": 0.5}, "base": 0.0},
        "vector_dtype": "int8",
        "vocabulary": "strict",
        "force": False,
    }
    assert given.dial.variants == {"both": (0.5, 0.0), "base": (0.0, 0.0)}
    loaded, _ = LoaderConfig.split(options)
    assert loaded.dial == given.dial
    assert [variant.alpha_text for variant in spec.variants] == ["reasoning=0.5", "0"]


def test_an_engine_takes_what_its_variants_have() -> None:
    """Also where requests may not choose so much: it knows them as variants'."""
    given = config(0, 5, alpha_range="0.5:1")
    (spec,) = plan_engines(given, mode="dial", environ={})
    options = json.loads(after(spec, "--model-loader-extra-config"))
    loaded, _ = LoaderConfig.split(options)
    assert loaded.dial.allowed == given.dial.allowed == (0.5, 1.0)
    assert loaded.dial.of_value(5) == (5.0,)
    with pytest.raises(AlphaRequestError):
        loaded.dial.of_value(3)


def test_a_dials_vector_keeps_its_name_where_it_was_fetched_to(tmp_path: Path) -> None:
    """A folder of a cache is called something else; one that is not gets no name."""
    given = load_config(None, {"model": "m", "vector": "owner/steps"})
    found = given.found_in([tmp_path / "c0ffee"])
    assert found.dial == given.dial
    (spec,) = plan_engines(found, mode="dial", environ={})
    options = json.loads(after(spec, "--model-loader-extra-config"))
    assert options["vectors"] == [{"path": str(tmp_path / "c0ffee"), "name": "steps"}]
    assert "vector" not in options
    fused = plan_engines(found, environ={})[0]
    assert json.loads(after(fused, "--model-loader-extra-config"))["vector"] == found.vector
    assert dial_options()["vector"] == "v"


def test_names_are_not_told_to_fused_engines(tmp_path: Path) -> None:
    """They have no use for them."""
    given = load_config(None, {"model": "m", "vectors": [{"path": "a", "name": "n"}]})
    (spec, _) = plan_engines(given.found_in([tmp_path]), environ={})
    options = json.loads(after(spec, "--model-loader-extra-config"))
    assert options["vectors"] == [{"path": str(tmp_path)}]


def test_the_users_flags_and_a_dials() -> None:
    """Of lists of processors vLLM takes the last, and each middleware by itself."""
    spec = plan_dial(
        *("--logits-processors", "x", "--middleware", "c", "--seed", "1"),
        *("--logits-processors", "y", "z", "--middleware=d"),
        engine={"middleware": ["a", "b"], "max-model-len": 64},
    )
    words = list(spec.argv[spec.argv.index("/health") + 1 :])
    assert words == [
        *("--max-model-len", "64", "--seed", "1"),
        *DIAL_WORDS[:4],
        *("--logits-processors", "y", "z", DIAL_WORDS[5]),
        *("--middleware", "a", "--middleware", "b", "--middleware", "c", "--middleware", "d"),
        *DIAL_WORDS[6:],
    ]


def test_vllm_reads_a_dials_flags_as_they_are_meant() -> None:
    """By its own parser: the user's processors and middleware, and ours behind them."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    flags = ("--middleware", "a", "--middleware", "b", "--logits-processors", "x", "y")
    spec = plan_dial(*flags)
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(list(spec.argv[3:]))
    assert parsed.middleware == ["a", "b", DIAL_WORDS[7]]
    assert parsed.logits_processors == ["x", "y", DIAL_WORDS[5]]
    assert (parsed.worker_cls, parsed.scheduler_cls) == (DIAL_WORDS[1], DIAL_WORDS[3])
    assert parsed.model_loader_extra_config == DIAL_OPTIONS


def test_a_dial_has_all_of_the_memory_and_needs_no_plugin() -> None:
    """It is one engine, and another alpha needs no reload."""
    spec = plan_dial(admin_key="k")
    assert "--gpu-memory-utilization" not in spec.argv
    assert "--worker-extension-cls" not in spec.argv
    assert "VLLM_PLUGINS" not in spec.env


@pytest.mark.parametrize("key", ["mode", "alpha_range", "variants", "vector_dtype"])
def test_a_dials_options_are_ours_to_give(key: str) -> None:
    """So that router and engine have the same."""
    with pytest.raises(ConfigError) as caught:
        plan_dial("--model-loader-extra-config", json.dumps({key: 1}))
    assert f"{key}: a setting of" in caught.value.why
