"""What people write is checked once, and every complaint is about something they can see."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr

from vllm_rvec.errors import ConfigError
from vllm_rvec.serve import (
    ServeConfig,
    VariantConfig,
    load_config,
    parse_alphas,
    variant_name,
    variants_from_alphas,
)

if TYPE_CHECKING:
    from pathlib import Path

MINIMAL = "model: some/model\nvector: some/vector\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "serve.yaml"


def problems(path: Path, text: str, **overrides: object) -> list[str]:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert str(path) in str(caught.value)
    return list(caught.value.problems) or [caught.value.why]


def test_two_lines_are_enough(file: Path) -> None:
    """A model and a vector give base and enhanced@1 on 127.0.0.1:8000."""
    file.write_text(MINIMAL)
    config = load_config(file, {})
    assert {name: variant.alpha for name, variant in config.variants.items()} == {
        "base": 0.0,
        "enhanced@1": 1.0,
    }
    assert (config.host, config.port, config.api_key) == ("127.0.0.1", 8000, None)
    assert (config.vocabulary, config.force) == ("strict", False)


def test_every_setting_is_read(file: Path) -> None:
    """A whole file comes through; numbers for the environment become text."""
    file.write_text(
        """
model: some/model
vector: some/vector
vocabulary: common
force: true
variants: {plain: {alpha: 0}, half: {alpha: 0.5}, also-half: {alpha: 0.5}}
host: 0.0.0.0
port: 0
api_key: secret
drain_seconds: 5
mode: dial
alpha_range: -1:2
vector_dtype: int8
engine: {max-model-len: 512, enforce-eager: true}
env: {VLLM_CPU_KVCACHE_SPACE: 1}
"""
    )
    config = load_config(file, {})
    assert list(config.variants) == ["plain", "half", "also-half"]
    assert (config.vocabulary, config.force) == ("common", True)
    assert config.api_key == SecretStr("secret")
    assert config.engine_flags == {"max-model-len": 512, "enforce-eager": True}
    assert config.env == {"VLLM_CPU_KVCACHE_SPACE": "1"}
    assert (config.host, config.port, config.drain_seconds) == ("0.0.0.0", 0, 5)
    assert (config.mode, config.alpha_range, config.vector_dtype) == ("dial", (-1, 2), "int8")


def test_the_command_line_wins_and_none_means_not_given(file: Path) -> None:
    """An override replaces the file's value; None leaves it."""
    file.write_text(MINIMAL + "port: 1234\n")
    overrides = {"model": "other", "port": None, "variants": variants_from_alphas((0.5,))}
    config = load_config(file, overrides)
    assert (config.model, config.port) == ("other", 1234)
    assert config.variants == {"enhanced@0.5": VariantConfig(alpha=0.5)}


def test_vectors_of_the_command_line_replace_the_files(file: Path) -> None:
    """However many there are on either side."""
    one, two = {"vector": "a"}, {"vectors": [{"path": "a"}, {"path": "b"}]}
    for text in (MINIMAL, "model: m\nvectors: [{path: x, layers: 3}]\n"):
        file.write_text(text)
        assert [vector.path for vector in load_config(file, one).recipe] == ["a"]
        assert [vector.path for vector in load_config(file, two).recipe] == ["a", "b"]


def test_no_file_is_needed() -> None:
    """The command line alone can say all."""
    assert load_config(None, {"model": "m", "vector": "v"}).model == "m"


def test_without_a_file_the_message_names_the_options() -> None:
    """What is missing is missing from the command line."""
    with pytest.raises(ConfigError, match="the options can't be used") as caught:
        load_config(None, {"model": "m"})
    assert caught.value.problems == ("`vector` is missing",)


def test_relative_folders_are_taken_from_the_files_folder(file: Path, tmp_path: Path) -> None:
    """A model beside the file is found from any working directory; a Hub id stays as it is."""
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    file.write_text("model: models/tiny\nvector: org/vector\n")
    config = load_config(file, {})
    assert config.model == str(tmp_path / "models" / "tiny")
    assert config.vector == "org/vector"


def test_relative_folders_from_the_command_line_stay(file: Path, tmp_path: Path) -> None:
    """What is typed is relative to where it is typed."""
    (tmp_path / "tiny").mkdir()
    file.write_text(MINIMAL)
    assert load_config(file, {"model": "tiny"}).model == "tiny"


def test_all_problems_come_at_once(file: Path) -> None:
    """One run shows everything that is wrong, in the names that the file uses."""
    found = problems(
        file,
        "modle: x\nvector: ''\nport: 99999\nvariants: {a: {alpha: high}, b: {alfa: 1}}\n",
        host="",
    )
    assert found == [
        "`model` is missing",
        "`vector`: String should have at least 1 character",
        "`variants.a.alpha`: should be a valid number, unable to parse string as a number",
        "`variants.b.alpha` is missing",
        "`variants.b.alfa` is not a setting; did you mean `alpha`?",
        "`host`: String should have at least 1 character (from the command line)",
        "`port`: should be less than or equal to 65535",
        "`modle` is not a setting; did you mean `model`?",
    ]


@pytest.mark.parametrize("alpha", [".nan", ".inf", "-.inf", "1.0e+39", "true", "[1]"])
def test_an_alpha_is_a_finite_number(file: Path, alpha: str) -> None:
    """Nothing else scales a vector."""
    (found,) = problems(file, MINIMAL + f"variants: {{a: {{alpha: {alpha}}}}}\n")
    assert found.startswith("`variants.a.alpha`: ")
    assert "should be a" in found or "is not finite" in found or "float32" in found


@pytest.mark.parametrize("name", ["''", "'a b'", "'a,b'", r'"a\tb"', r'"a\e[31m"', '"\\u00a0"'])
def test_a_variants_name_can_be_typed(file: Path, name: str) -> None:
    """Names go into requests, URLs and terminals."""
    (found,) = problems(file, MINIMAL + f"variants: {{{name}: {{alpha: 1}}}}\n")
    assert "printable text without spaces or commas" in found


def test_there_is_at_least_one_variant(file: Path) -> None:
    """An empty mapping is not the default."""
    (found,) = problems(file, MINIMAL + "variants: {}\n")
    assert found.startswith("`variants`: Dictionary should have at least 1 item")


def test_a_key_given_twice_is_refused(file: Path) -> None:
    """PyYAML would keep the last without a word."""
    (found,) = problems(file, MINIMAL + "variants:\n  a: {alpha: 0}\n  a: {alpha: 1}\n")
    assert found == "line 5, column 3: `a` is given twice"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- model\n", "its top level is a list"),
        ("just words\n", "its top level is a str"),
        ("model: [\n", "line 2"),
        ("? [a]\n: b\n", "unhashable key"),
        ("!!python/object:os.system {}\n", "could not determine a constructor"),
    ],
)
def test_other_yaml_is_refused_in_words(file: Path, text: str, words: str) -> None:
    """The message says what the file is instead."""
    assert words in problems(file, text)[0]


def test_bytes_that_are_not_text_are_refused(file: Path) -> None:
    """A binary file is no configuration."""
    file.write_bytes(b"\x80\x00\xff")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(file, {})


def test_an_empty_file_misses_what_is_required(file: Path) -> None:
    """It is an empty mapping, not an error of its own."""
    assert problems(file, "") == ["`model` is missing", "`vector` is missing"]


def test_a_missing_file_is_named(file: Path) -> None:
    """The operating system's reason is passed on."""
    with pytest.raises(ConfigError, match="No such file or directory"):
        load_config(file, {})


@pytest.mark.parametrize(
    "line",
    [
        "api_key: [sekrit-value]",
        "apikey: sekrit-value",
        "api_key: 'sekrit-value",
        "api_key: sekrit-value: x",
    ],
)
def test_the_api_key_is_never_echoed(file: Path, line: str) -> None:
    """Neither by our message, nor by a cause's, whatever is wrong with its line."""
    file.write_text(MINIMAL + line + "\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, {})
    shown = "".join(traceback.format_exception(caught.value))
    assert "sekrit" not in shown


def test_the_api_key_is_not_in_the_configurations_repr() -> None:
    """A log of the configuration does not give it away."""
    settings = {"api_key": "sekrit-value", "env": {"HF_TOKEN": "sekrit-too"}}
    config = load_config(None, {"model": "m", "vector": "v", **settings})
    assert "sekrit" not in repr(config)
    assert "sekrit" not in str(config)


def test_engines_keys_are_not_the_users_to_set(file: Path) -> None:
    """`VLLM_API_KEY` in `env` would be overwritten; say so."""
    (found,) = problems(file, MINIMAL + "env: {VLLM_API_KEY: x}\n")
    assert "set `api_key`" in found


def test_a_flag_without_a_value_is_refused(file: Path) -> None:
    """`enforce-eager:` is null in YAML; the user meant true."""
    (found,) = problems(file, MINIMAL + "engine: {enforce-eager: }\n")
    assert found == "`engine.enforce-eager`: has no value; for a flag that takes none, write true"


def test_every_field_is_documented() -> None:
    """Each field's line is followed by its docstring."""
    import ast
    import inspect
    import textwrap

    for model in (ServeConfig, VariantConfig):
        body = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, [*body.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                assert isinstance(following, ast.Expr), ast.unparse(statement)


@pytest.mark.parametrize(
    ("alpha", "name"),
    [
        (0.0, "base"),
        (-0.0, "base"),
        (1, "enhanced@1"),
        (0.5, "enhanced@0.5"),
        (-1.0, "enhanced@-1"),
        (0.1 + 0.2, "enhanced@0.30000000000000004"),
        (1e-7, "enhanced@1e-07"),
    ],
)
def test_a_variant_is_named_for_its_alpha(alpha: float, name: str) -> None:
    """The name is short and reads back as the very same number."""
    assert variant_name(alpha) == name
    if alpha:
        assert float(name.removeprefix("enhanced@")) == alpha


def test_alphas_are_read_in_order() -> None:
    """Spaces do not matter; order does."""
    assert parse_alphas("1, 0 ,-0.5") == (1.0, 0.0, -0.5)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0,x", "'x' is not a number"),
        ("nan", "nan is not finite"),
        ("0,inf", "inf is not finite"),
        ("0.5,0.50", "0.50 is given twice"),
        ("0,-0", "-0 is given twice"),
        ("", "a number is missing"),
        ("0,,1", "a number is missing"),
    ],
)
def test_bad_alphas_are_refused(text: str, problem: str) -> None:
    """The message names the part that is wrong."""
    with pytest.raises(ConfigError) as caught:
        parse_alphas(text)
    assert caught.value.problems == (problem,)


def test_the_admin_key_must_be_another_than_the_clients(file: Path) -> None:
    """Else every client could change variants; neither is quoted."""
    file.write_text(MINIMAL + "api_key: sekrit-value\nadmin_key: sekrit-value\n")
    with pytest.raises(ConfigError, match="`admin_key` is the same as `api_key`") as caught:
        load_config(file, {})
    assert "sekrit" not in "".join(traceback.format_exception(caught.value))
    file.write_text(MINIMAL + "api_key: sekrit-value\nadmin_key: sekrit-too\n")
    assert "sekrit" not in repr(load_config(file, {}))


def test_a_url_is_no_file_beside_the_configuration(tmp_path: Path) -> None:
    """Taken as it is, also where its signature is longer than any file's name."""
    url = f"https://host/v?sig={'0' * 300}"
    (tmp_path / "serve.yaml").write_text(f"model: owner/model\nvector: {url}\n")
    assert load_config(tmp_path / "serve.yaml", {}).vector == url


@pytest.mark.parametrize("text", ["-1:2", "-1.5:2.5", "0:1", "'1:20'", "-0.5:20.25"])
def test_a_range_is_two_numbers_in_yaml_too(file: Path, text: str) -> None:
    """YAML 1.1 would take some of these for one number to base 60."""
    file.write_text(MINIMAL + f"alpha_range: {text}\n")
    found = load_config(file, {}).alpha_range
    assert found is not None
    assert list(found) == [float(end) for end in text.strip("'").split(":")]


@pytest.mark.parametrize("text", ["2:1", "1", "[0, 1]", "x", "'0:nan'"])
def test_other_ranges_are_refused(file: Path, text: str) -> None:
    """With how to write one, on one line."""
    (found,) = problems(file, MINIMAL + f"alpha_range: {text}\n")
    assert found.startswith("`alpha_range`: ")
    assert found.endswith("such as -1:2")


def test_a_variant_may_have_an_alpha_for_each_vector(file: Path) -> None:
    """By the names of vectors; 0 for those that are left out."""
    file.write_text(
        "model: m\nvectors: [{path: a/x}, {path: b, name: y}]\n"
        "variants: {one: {alpha: {y: 0.5}}, both: {alpha: 1}}\n"
    )
    config = load_config(file, {})
    assert config.dial.vectors == ("x", "y")
    assert config.dial.variants == {"one": (0.0, 0.5), "both": (1.0, 1.0)}


@pytest.mark.parametrize(
    ("alpha", "problem"),
    [
        ("{vector: high}", "`variants.a.alpha.vector`: should be a valid number, unable to parse"),
        ("{vector: true}", "`variants.a.alpha.vector`: should be a number, not true or false"),
        ("{}", "`variants.a.alpha`: Dictionary should have at least 1 item"),
        ("{v: 1}", "`variants.a.alpha`: no vector is called v; there are vector"),
    ],
)
def test_an_alpha_for_each_vector_is_checked(file: Path, alpha: str, problem: str) -> None:
    """One problem each, where it is."""
    (found,) = problems(file, MINIMAL + f"variants: {{a: {{alpha: {alpha}}}}}\n")
    assert found.startswith(problem)
