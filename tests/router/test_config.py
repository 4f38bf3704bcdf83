"""vllm_rvec.router.config: what people write is checked once, whole, and never quoted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from vllm_rvec.errors import ConfigError
from vllm_rvec.router import RouteConfig, Routing, load_route_config
from vllm_rvec.router.config import load_routing
from vllm_rvec.router.keyring import hash_key
from vllm_rvec.router.remote import make_table
from vllm_rvec.vector.dial import AlphaRange, Dial

if TYPE_CHECKING:
    from pathlib import Path

MINIMAL = """
variants:
  base: {alpha: 0, upstreams: [{url: "http://10.0.0.1:8000"}]}
  enhanced@1: {alpha: 1, upstreams: [{url: "http://10.0.0.2:8000"}]}
"""

DIAL = """
variants:
  base: {alpha: 0}
  half: {alpha: {style: 0.5}}
  other: {upstreams: [{url: "http://10.0.0.2:8000"}]}
dial:
  upstreams: [{url: "http://10.0.0.1:8000"}]
  vectors: [reasoning, style]
  alpha_range: -0.5:1
"""

EVERYTHING = f"""
host: 0.0.0.0
port: 0
drain_seconds: 5
insecure: true
tls: {{certificate: cert.pem, key: /etc/key.pem}}
cors_origins: ["https://app.example.com"]
admin_key_sha256: {hash_key("admin")}
keys:
  team: {{sha256: {hash_key("team")}, requests_per_minute: 600, max_in_flight: 32}}
variants:
  base:
    alpha: 0
    upstreams: [{{url: "http://10.0.0.1:8000/v1/", api_key_env: ENGINE_KEY}}]
    max_in_flight: 64
  enhanced@1:
    alpha: 1
    vector: s3://vectors/demo
    fingerprint: "blake3:0"
    upstreams: [{{url: "https://engine.example.com"}}]
    fallback: base
  half: {{alpha: 0.5}}
dial:
  upstreams: [{{url: "http://10.0.0.4:8000"}}]
  vectors: [reasoning]
  alpha_range: "-1:2"
aliases:
  assistant:
    split: {{base: 50, enhanced@1: 49.5, enhanced@0.25: 0}}
    salt: 2026-11
    shadow:
      variant: half
      share: 0.1
      queue: 8
      concurrency: 2
      timeout_seconds: 30
      record: pairs.jsonl
      max_record_mib: 1
  default: base
health: {{interval_seconds: 1, timeout_seconds: 2.5, failures: 1}}
results: {{path: results.sqlite, max_mib: 1, keep_files: 0, keep_prompts: true}}
access_log: logs/access.jsonl
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "route.yaml"


def load(file: Path, text: str, **overrides: object) -> RouteConfig:
    file.write_text(text)
    return load_route_config(file, overrides)


def problems(file: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(file, text)
    assert str(file) in str(caught.value)
    return list(caught.value.problems)


def with_base(**settings: object) -> str:
    """The minimal file and more."""
    return MINIMAL + yaml.safe_dump(settings)


def set_at(values: dict[str, Any], dotted: str, value: object) -> dict[str, Any]:
    """Put a value where the steps lead."""
    *steps, last = dotted.split("/")
    inner: Any = values
    for step in steps:
        inner = inner[int(step)] if isinstance(inner, list) else inner[step]
    inner[last] = value
    return values


def test_variants_are_all_that_is_needed(file: Path) -> None:
    """On 127.0.0.1:8000, without keys, aliases or records; checked every 5 s."""
    config = load(file, MINIMAL)
    assert (config.host, config.port, config.insecure) == ("127.0.0.1", 8000, False)
    assert (config.aliases, config.keys, config.cors_origins) == ({}, {}, [])
    assert [config.tls, config.results, config.access_log, config.dial] == [None] * 4
    assert (config.health.interval_seconds, config.health.failures) == (5, 3)
    assert list(config.variants) == ["base", "enhanced@1"]


def test_every_setting_is_read(file: Path) -> None:
    """A whole file comes through; what it says is what holds."""
    config = load(file, EVERYTHING)
    written = yaml.safe_load(EVERYTHING)
    read = config.model_dump()
    for name in ("host", "port", "drain_seconds", "insecure", "cors_origins", "health", "keys"):
        assert read[name] == written[name], name
    assert config.admin_key_sha256 == hash_key("admin")
    base, enhanced = config.variants["base"], config.variants["enhanced@1"]
    assert base.upstreams is not None
    assert (base.upstreams[0].url, base.upstreams[0].api_key_env, base.max_in_flight) == (
        "http://10.0.0.1:8000",
        "ENGINE_KEY",
        64,
    )
    said = [enhanced.alpha, enhanced.vector, enhanced.fingerprint, enhanced.fallback]
    assert said == [1, "s3://vectors/demo", "blake3:0", "base"]
    assert not config.variants["half"].upstreams
    assistant = config.aliases["assistant"]
    assert assistant.split == {"base": 50, "enhanced@1": 49.5, "enhanced@0.25": 0}
    assert assistant.is_split
    assert assistant.salt == "2026-11"
    shadow = assistant.shadow
    assert shadow is not None
    assert shadow.model_dump(exclude={"record"}) == {
        "variant": "half",
        "share": 0.1,
        "queue": 8,
        "concurrency": 2,
        "timeout_seconds": 30,
        "max_record_mib": 1,
    }
    assert config.results is not None
    assert (config.results.max_mib, config.results.keep_files) == (1, 0)
    assert config.results.keep_prompts


def test_a_plain_name_is_an_alias_of_one(file: Path) -> None:
    """`default: base` is `default: {split: {base: 1}}`, and no split."""
    config = load(file, with_base(aliases={"default": "base"}))
    assert config.aliases["default"].split == {"base": 1}
    assert not config.aliases["default"].is_split


def test_flags_win_over_the_file(file: Path) -> None:
    """What is not given is the file's."""
    config = load(file, MINIMAL + "host: 10.0.0.9\nport: 1\n", port=2, host=None)
    assert (config.host, config.port) == ("10.0.0.9", 2)


def test_relative_paths_are_the_files_folders(file: Path) -> None:
    """Wherever the command is run; absolute ones, stderr and what is no path stay."""
    config = load(file, EVERYTHING)
    folder = file.parent
    assert config.tls is not None
    assert config.results is not None
    shadow = config.aliases["assistant"].shadow
    assert shadow is not None
    assert config.tls.certificate == str(folder / "cert.pem")
    assert config.tls.key == "/etc/key.pem"
    assert config.results.path == str(folder / "results.sqlite")
    assert config.access_log == str(folder / "logs" / "access.jsonl")
    assert shadow.record == str(folder / "pairs.jsonl")
    assert load(file, with_base(access_log="-")).access_log == "-"


@pytest.mark.parametrize(
    "place",
    ["access_log", "results/path", "tls/certificate", "tls/key", "aliases/assistant/shadow/record"],
)
def test_an_empty_path_is_not_the_folder(file: Path, place: str) -> None:
    """It names no file, and is refused as such."""
    values = set_at(yaml.safe_load(EVERYTHING), place, "")
    (found,) = problems(file, yaml.safe_dump(values))
    assert found.startswith(f"`{place.replace('/', '.')}`: ")


@pytest.mark.parametrize(
    ("place", "meant"),
    [
        ("prot", "port"),
        ("aliases/assistant/slat", "salt"),
        ("aliases/assistant/shadow/vriant", "variant"),
        ("keys/team/requests_per_minut", "requests_per_minute"),
        ("variants/base/falback", "fallback"),
        ("variants/base/upstreams/0/ulr", "url"),
        ("dial/upstreams/0/api_key_evn", "api_key_env"),
        ("dial/alpha_rnage", "alpha_range"),
        ("results/pth", "path"),
        ("health/failurs", "failures"),
        ("tls/certificat", "certificate"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest(file: Path, place: str, meant: str) -> None:
    """At every depth."""
    values = set_at(yaml.safe_load(EVERYTHING), place, "x")
    name = place.replace("/", ".")
    expected = [f"`{name}` is not a setting; did you mean `{meant}`?"]
    assert problems(file, yaml.safe_dump(values)) == expected


@pytest.mark.parametrize("name", ["split", "salt", "shadow", "alpha", "upstreams", "x"])
def test_names_that_are_settings_elsewhere_do_not_mislead(file: Path, name: str) -> None:
    """An alias may be called `shadow`, and a variant `alpha`."""
    variants = {name: {"alpha": 0, "upstreams": [{"url": "http://a"}], "falback": "x"}}
    values = {"variants": variants, "aliases": {name + "-2": {"slat": "x", "split": {name: 1}}}}
    assert problems(file, yaml.safe_dump(values)) == [
        f"`aliases.{name}-2.slat` is not a setting; did you mean `salt`?",
        f"`variants.{name}.falback` is not a setting; did you mean `fallback`?",
    ]
    (found,) = problems(file, with_base(aliases={name: {"slat": "x", "split": {"base": 1}}}))
    assert found == f"`aliases.{name}.slat` is not a setting; did you mean `salt`?"


def test_all_problems_are_told_at_once(file: Path) -> None:
    """A line each, none twice."""
    text = """
port: 99999
keys: {team: {sha256: xyz}}
variants: {base: {alpha: much, upstreams: []}}
aliases: {a: {split: {}}}
"""
    found = problems(file, text)
    places = [problem.split("`")[1] for problem in found]
    assert sorted(places) == [
        "aliases.a.split",
        "keys.team.sha256",
        "port",
        "variants.base.alpha",
        "variants.base.upstreams",
    ]


def test_no_value_is_quoted(file: Path) -> None:
    """One may be a key in the wrong place; nor is the line in which YAML ends."""
    values = yaml.safe_load(EVERYTHING)
    for place in (
        "admin_key_sha256",
        "keys/team/sha256",
        "keys/team/max_in_flight",
        "variants/base/alpha",
        "variants/base/max_in_flight",
        "aliases/assistant/split/base",
        "health/failures",
        "port",
    ):
        set_at(values, place, "sesame")
    set_at(values, "variants/enhanced@1/upstreams/0/url", "http://user:sesame@host")
    set_at(values, "dial/alpha_range", 5)
    found = problems(file, yaml.safe_dump(values))
    assert len(found) == 10
    assert "sesame" not in " ".join(found)
    file.write_text("keys: {team: sesame: 1}\n")
    with pytest.raises(ConfigError) as caught:
        load_route_config(file)
    assert "sesame" not in str(caught.value)
    assert "line 1" in str(caught.value)


def test_a_hash_is_in_no_repr(file: Path) -> None:
    """A key's hash is of no use to others, and of none in a log."""
    assert hash_key("team") not in repr(load(file, EVERYTHING))


@pytest.mark.parametrize(
    ("settings", "where", "name"),
    [
        ({"aliases": {"a": {"split": {"base": 1, "nobody": 1}}}}, "aliases.a.split", "nobody"),
        ({"aliases": {"a": "nobody"}}, "aliases.a.split", "nobody"),
        (
            {"aliases": {"a": {"split": {"base": 1}, "shadow": {"variant": "nobody"}}}},
            "aliases.a.shadow.variant",
            "nobody",
        ),
        ({"aliases": {"a": "enhanced@0.35"}}, "aliases.a.split", "enhanced@0.35"),
        ({"aliases": {"a": "base", "b": "a"}}, "aliases.b.split", "a"),
    ],
)
def test_a_variant_that_is_not_there(
    file: Path, settings: dict[str, object], where: str, name: str
) -> None:
    """With those that are; an alias is none."""
    there = "base, enhanced@1"
    expected = [f"`{where}`: there is no variant {name}; there are {there}"]
    assert problems(file, with_base(**settings)) == expected


@pytest.mark.parametrize(
    ("fallback", "said"),
    [("nobody", "there is no variant nobody"), ("base", "it can't stand in for itself")],
)
def test_a_fallback_that_is_none(file: Path, fallback: str, said: str) -> None:
    """It must be there, and another."""
    values = set_at(yaml.safe_load(MINIMAL), "variants/base/fallback", fallback)
    (found,) = problems(file, yaml.safe_dump(values))
    assert found.startswith(f"`variants.base.fallback`: {said}")


def test_an_alias_must_not_hide_a_variant(file: Path) -> None:
    """Nor a name that a dial answers to."""
    found = problems(file, with_base(aliases={"base": "enhanced@1"}))
    assert found == ["`aliases.base`: a variant has this name"]
    found = problems(file, DIAL + "aliases: {enhanced@0.5: base}\n")
    assert found == ["`aliases.enhanced@0.5`: a variant has this name"]


@pytest.mark.parametrize("weight", [-1, ".nan", ".inf", "-.inf", "much", "true", '"5"', "null"])
def test_a_weight_that_is_none(file: Path, weight: object) -> None:
    """A finite number from 0 on; a text or a truth value is no number."""
    (found,) = problems(file, f"{MINIMAL}\naliases: {{a: {{split: {{base: {weight}}}}}}}\n")
    assert found.startswith("`aliases.a.split.base`: should be ")


def test_weights_must_choose_somebody(file: Path) -> None:
    """0 keeps a variant out, but not all of them."""
    found = problems(file, with_base(aliases={"a": {"split": {"base": 0, "enhanced@1": 0}}}))
    assert found == ["`aliases.a.split`: one weight at least must be above 0"]
    config = load(file, with_base(aliases={"a": {"split": {"base": 0, "enhanced@1": 1}}}))
    assert config.aliases["a"].split["base"] == 0


@pytest.mark.parametrize(
    "url",
    [
        "10.0.0.1:8000",
        "ftp://host",
        "http://",
        "http:///v1",
        "http://:8000",
        "http://host:port",
        "http://host:99999",
        "http://host:0",
        "http://user:key@host",
        "http://host?key=x",
        "http://host#x",
        "http://ho st",
        "http://host\nX-Y: z",
        "http://[::1",
        "",
    ],
)
def test_a_url_that_is_none(file: Path, url: str) -> None:
    """Scheme, host and port, and no key."""
    values = set_at(yaml.safe_load(MINIMAL), "variants/base/upstreams/0/url", url)
    (found,) = problems(file, yaml.safe_dump(values))
    assert found.startswith("`variants.base.upstreams.0.url`: should be http://HOST:PORT")


@pytest.mark.parametrize(
    ("url", "read"),
    [
        ("http://host:8000/", "http://host:8000"),
        ("https://host/v1", "https://host"),
        ("https://host/v1/", "https://host"),
        ("http://[::1]:80", "http://[::1]:80"),
        ("https://gateway/engines/7", "https://gateway/engines/7"),
    ],
)
def test_a_url_may_end_as_clients_write_it(file: Path, url: str, read: str) -> None:
    """With `/v1` or without; a path before that stays."""
    values = set_at(yaml.safe_load(MINIMAL), "variants/base/upstreams/0/url", url)
    upstreams = load(file, yaml.safe_dump(values)).variants["base"].upstreams
    assert upstreams is not None
    assert upstreams[0].url == read


@pytest.mark.parametrize("name", ["", "two words", "a,b", "Zoë", "tab\t"])
@pytest.mark.parametrize("section", ["aliases", "variants", "keys"])
def test_a_name_that_can_not_be_one(file: Path, section: str, name: str) -> None:
    """Names stand in headers and lists."""
    values = yaml.safe_load(EVERYTHING)
    values[section][name] = {"aliases": "base", "variants": {"alpha": 0}}.get(
        section, {"sha256": "0" * 64}
    )
    (found,) = problems(file, yaml.safe_dump(values))
    assert "a name is printable ASCII text without spaces or commas" in found


def test_keys_that_protect_nothing(file: Path) -> None:
    """The same for two, the empty one, a client's that is the admin's: said by the check."""
    one, admin = {"sha256": hash_key("one")}, {"sha256": hash_key("admin").upper()}
    (found,) = problems(file, with_base(keys={"a": one, "b": one}))
    assert found == "`keys`: 'a' and 'b' have the same key."
    (found,) = problems(file, with_base(keys={"a": {"sha256": hash_key("")}}))
    assert found == "`keys`: The key of 'a' is the empty one."
    (found,) = problems(file, with_base(keys={"a": admin}, admin_key_sha256=hash_key("admin")))
    assert found == "`admin_key_sha256`: it is the key of a, who could change variants"


def test_an_engines_key_comes_from_the_environment(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file names the variable; the key is in no repr."""
    values = set_at(yaml.safe_load(MINIMAL), "variants/base/upstreams/0/api_key_env", "ENGINE_KEY")
    config = load(file, yaml.safe_dump(values))
    monkeypatch.setenv("ENGINE_KEY", "sesame")
    (upstream,) = make_table(config).upstreams("base")
    assert (upstream.base_url, upstream.api_key) == ("http://10.0.0.1:8000", "sesame")
    assert "sesame" not in repr(upstream)


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "is not set"), ("", "is not set"), ("sesame\n", "holds more than one line of text")],
)
def test_an_engines_key_that_is_missing(
    file: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, said: str
) -> None:
    """Or that no header could be made of; the variable is named, its value is not."""
    values = set_at(yaml.safe_load(MINIMAL), "variants/base/upstreams/0/api_key_env", "ENGINE_KEY")
    config = load(file, yaml.safe_dump(values))
    monkeypatch.delenv("ENGINE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("ENGINE_KEY", value)
    with pytest.raises(ConfigError) as caught:
        make_table(config)
    assert said in str(caught.value)
    assert "ENGINE_KEY" in str(caught.value)
    assert "sesame" not in str(caught.value)


def test_a_dials_variants_have_alphas_by_vector(file: Path) -> None:
    """One number is for all; what is not named is 0. Others have engines of their own."""
    config = load(file, DIAL)
    dial = config.made_dial()
    assert dial is not None
    assert dial.vectors == ("reasoning", "style")
    assert dial.variants == {"base": (0, 0), "half": (0, 0.5)}
    assert dial.allowed == AlphaRange(-0.5, 1)
    assert load(file, MINIMAL).made_dial() is None


def test_a_dials_other_names_may_stand_in_a_split(file: Path) -> None:
    """Any alpha in its range; beyond that there is no such variant."""
    split = "aliases: {{a: {{split: {{base: 1, {}: 1}}}}}}\n"
    config = load(file, DIAL + split.format("enhanced@0.35"))
    assert "enhanced@0.35" in config.aliases["a"].split
    (found,) = problems(file, DIAL + split.format("enhanced@1.5"))
    assert "there is no variant enhanced@1.5" in found


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("variants/base/alpha", None, "`variants.base.alpha` is missing, which the dial"),
        ("variants/half/alpha", {"stile": 1}, "`variants.half.alpha`: no vector is called stile"),
        ("variants/half/alpha", {}, "`variants.half.alpha`: "),
        ("variants/half/alpha", float("nan"), "`variants.half.alpha`: is not finite"),
        ("variants/half/alpha", {"style": "x"}, "`variants.half.alpha.style`: should be a valid"),
        ("variants/other/alpha", {"style": 1}, "`variants.other.alpha`: one number, as its"),
        ("dial/upstreams", [], "`dial.upstreams`: "),
        ("dial/vectors", [], "`dial.vectors`: "),
        ("dial/vectors", ["style", "style"], "`dial.vectors`: one of them is there twice"),
        ("dial/alpha_range", "2:1", "`dial.alpha_range`: alpha range '2:1' can't be used"),
        ("dial/alpha_range", 2, "`dial.alpha_range`: should be the two ends, such as -1:2"),
    ],
)
def test_what_a_dial_can_not_be(file: Path, place: str, value: object, said: str) -> None:
    """One line, about what is wrong."""
    values = set_at(yaml.safe_load(DIAL), place, value)
    (found,) = problems(file, yaml.safe_dump(values))
    assert found.startswith(said)


def test_a_variant_without_upstreams_needs_a_dial(file: Path) -> None:
    """And a dial needs a variant: none would be asked for its alphas."""
    values = yaml.safe_load(DIAL)
    del values["dial"]
    assert problems(file, yaml.safe_dump(values)) == [
        "`variants.base.upstreams` is missing, and there is no `dial`",
        "`variants.half.upstreams` is missing, and there is no `dial`",
    ]
    (found,) = problems(file, MINIMAL + 'dial: {upstreams: [{url: "http://10.0.0.3:8000"}]}\n')
    assert found.startswith("`dial`: every variant has upstreams of its own")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("port", True),
        ("port", "8000"),
        ("insecure", "yes, please"),
        ("drain_seconds", -1),
        ("drain_seconds", float("inf")),
        ("host", ""),
        ("variants", {}),
        ("aliases", None),
        ("health", {"interval_seconds": 0}),
        ("health", {"timeout_seconds": True}),
        ("cors_origins", "*"),
        ("admin_key_sha256", "f00"),
    ],
)
def test_a_value_that_is_none_of_its_setting(file: Path, setting: str, value: object) -> None:
    """Types are YAML's own: nothing is guessed."""
    values = {**yaml.safe_load(MINIMAL), setting: value}
    (found,) = problems(file, yaml.safe_dump(values))
    assert found.startswith(f"`{setting}")


def test_a_name_that_is_given_twice(file: Path) -> None:
    """YAML would keep the last one without a word."""
    file.write_text(MINIMAL + "aliases: {a: base, a: enhanced@1}\n")
    with pytest.raises(ConfigError, match="`a` is given twice"):
        load_route_config(file)


def test_a_file_that_is_not_there(file: Path) -> None:
    """Its path is named."""
    with pytest.raises(ConfigError, match=str(file)):
        load_route_config(file)


def test_routing_of_serve_has_the_same_words(tmp_path: Path) -> None:
    """Below its key; variants are those that `serve` has, and may have limits."""
    values: dict[str, object] = {
        "aliases": {"a": {"split": {"base": 1, "enhanced@0.35": 1}}},
        "variants": {"base": {"max_in_flight": 1, "fallback": "enhanced@1"}},
        "results": {"path": "r.sqlite"},
    }
    dial = Dial(("v",), {"base": (0.0,), "enhanced@1": (1.0,)})
    routing = load_routing(values, tmp_path, ["base", "enhanced@1"], dial)
    assert routing.results is not None
    assert routing.results.path == str(tmp_path / "r.sqlite")
    assert routing.named_variants() == {"base", "enhanced@1", "enhanced@0.35"}
    with pytest.raises(ConfigError) as caught:
        load_routing(values, tmp_path, ["base"], None)
    assert caught.value.problems == (
        "`routing.aliases.a.split`: there is no variant enhanced@0.35; there are base",
        "`routing.variants.base.fallback`: there is no variant enhanced@1; there are base",
    )
    with pytest.raises(ConfigError) as caught:
        load_routing({"port": 1, "alaises": {}}, tmp_path, ["base"], None)
    first, second = caught.value.problems
    assert first.startswith("`routing.port` is not a setting")
    assert second == "`routing.alaises` is not a setting; did you mean `aliases`?"


def schema() -> dict[str, Any]:
    return RouteConfig.model_json_schema()


@pytest.mark.parametrize("text", [MINIMAL, DIAL.replace("-0.5:1", '"-0.5:1"'), EVERYTHING])
def test_the_schema_lets_good_files_through(text: str) -> None:
    """An editor underlines nothing in them."""
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(yaml.safe_load(text), schema())


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("prot", 1),
        ("port", "8000"),
        ("port", 99999),
        ("aliases/assistant/split/base", -1),
        ("aliases/assistant/split/base", "5"),
        ("aliases/assistant/slat", "x"),
        ("aliases/default", 7),
        ("keys/team/sha256", "f00"),
        ("variants/base/alpha", "much"),
        ("variants/base/upstreams", []),
        ("variants/base/upstreams/0/ulr", "x"),
        ("dial/alpha_range", 2),
        ("access_log", ""),
    ],
)
def test_the_schema_refuses_bad_files(file: Path, place: str, value: object) -> None:
    """What the check refuses for its form, an editor underlines."""
    values = set_at(yaml.safe_load(EVERYTHING), place, value)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, schema())
    assert problems(file, yaml.safe_dump(values))


@pytest.mark.parametrize("model", [RouteConfig, Routing])
def test_the_schema_describes_every_setting(model: type[Routing]) -> None:
    """In the words that stand under each field."""
    whole = model.model_json_schema()
    kinds = {model.__name__: whole, **whole["$defs"]}
    undescribed = [
        f"{kind}.{name}"
        for kind, said in kinds.items()
        for name, field in said["properties"].items()
        # pydantic leaves it out where the kind that it refers to says the same
        if not field.get("description") and "$ref" not in field
    ]
    assert undescribed == []
    assert all(said.get("description") for said in kinds.values())
    assert "relative weights" in str(whole["$defs"]["AliasConfig"]).lower()
