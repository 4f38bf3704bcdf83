"""vllm_rvec.cli.check_config: a file is right, or everything that is wrong with it is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import typer
import yaml
from typer.testing import CliRunner

from vllm_rvec.cli.check_config import check_config_command
from vllm_rvec.errors import ConfigError
from vllm_rvec.router import hash_key

if TYPE_CHECKING:
    from typer.testing import Result

DEMO = Path(__file__).resolve().parents[2] / "examples" / "reasoning_in_miniature" / "serve.yaml"

ROUTE = 'variants: {base: {upstreams: [{url: "http://10.0.0.1:8000"}]}}\n'
SERVE = "model: some/model\nvector: some/vector\n"


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_RVEC_API_KEY", raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "some.yaml"


def check(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(check_config_command)
    return CliRunner().invoke(app, [*map(str, arguments)])


def problem(file: Path, text: str) -> ConfigError:
    file.write_text(text)
    done = check(file)
    assert done.stdout == ""
    assert isinstance(done.exception, ConfigError)
    return done.exception


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (ROUTE + "aliases: {default: base}\n", "route"),
        (SERVE, "serve"),
        (SERVE + "routing: {aliases: {a: {split: {base: 1, enhanced@0.35: 1}}}}\n", "serve"),
    ],
)
def test_a_right_file_of_either_kind(file: Path, text: str, kind: str) -> None:
    """One line, which says what it is right for; nothing is started, nothing fetched."""
    file.write_text(text)
    done = check(file)
    assert (done.exit_code, done.stdout) == (0, f"{file} is right for `vllm-rvec {kind}`\n")


def test_the_demos_file_is_right() -> None:
    """What `make demo` serves; an editor agrees."""
    assert check(DEMO).stdout == f"{DEMO} is right for `vllm-rvec serve`\n"
    jsonschema.validate(yaml.safe_load(DEMO.read_text()), printed("serve"))


def test_all_problems_of_a_file_of_route(file: Path) -> None:
    """At once, without values."""
    error = problem(file, "prot: sesame\nkeys: {team: {sha256: sesame}}\n")
    assert len(error.problems) == 3
    assert "sesame" not in str(error)


def test_all_problems_of_a_file_of_serve(file: Path) -> None:
    """Those under `routing` are named so."""
    routing = "routing: {aliases: {base: nobody}, keys: {a: {sha256: sesame}}, results: {pth: x}}\n"
    error = problem(file, SERVE + routing)
    places = sorted(problem.split("`")[1] for problem in error.problems)
    assert places == ["routing.keys.a.sha256", "routing.results.path", "routing.results.pth"]
    assert "sesame" not in str(error)
    error = problem(file, SERVE + "routing: {aliases: {base: nobody}}\n")
    places = [problem.split("`")[1] for problem in error.problems]
    assert places == ["routing.aliases.base", "routing.aliases.base.split"]


@pytest.mark.parametrize("fused", ["mode: fused\n", "variants: {base: {alpha: 0}}\n"])
def test_a_split_over_alphas_that_only_a_dial_has(file: Path, fused: str) -> None:
    """Where `serve` would take none, it would refuse the file; so does the check."""
    routing = "routing: {aliases: {a: {split: {base: 1, enhanced@0.35: 1}}}}\n"
    error = problem(file, SERVE + fused + routing)
    assert "there is no variant enhanced@0.35" in str(error)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("engine: {port: 9}\n", "port"),
        ("mode: fused\nvector_dtype: int8\n", "vector_dtype"),
    ],
)
def test_what_serve_would_refuse_before_it_starts_anything(
    file: Path, more: str, said: str
) -> None:
    """Flags of engines that are ours to give; settings of a dial without one."""
    assert said in str(problem(file, SERVE + more))


@pytest.mark.parametrize("text", [ROUTE, SERVE])
def test_beyond_this_machine_only_with_a_key(
    file: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """In the file or in the environment, from where the commands take it."""
    text += "host: 0.0.0.0\n"
    assert "would let anybody on the network in" in str(problem(file, text))
    keys = {"keys": {"team": {"sha256": hash_key("sesame")}}}
    settings: dict[str, Any] = keys if text.startswith(ROUTE) else {"routing": keys}
    file.write_text(text + yaml.safe_dump(settings))
    assert check(file).exit_code == 0
    file.write_text(text)
    monkeypatch.setenv("VLLM_RVEC_API_KEY", "sesame")
    assert check(file).exit_code == 0


def test_nothing_to_check(tmp_path: Path) -> None:
    """Neither a file nor a schema, or a file that is not there."""
    for arguments in ([], [tmp_path / "none.yaml"], ["--schema", "engine"]):
        assert isinstance(check(*arguments).exception, ConfigError)


def printed(kind: str) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads(check("--schema", kind).stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    return schema


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("route", ROUTE, ROUTE + "prot: 1\n"),
        ("route", ROUTE + "aliases: {a: base}\n", ROUTE + "aliases: {a: {splt: {base: 1}}}\n"),
        ("serve", SERVE, SERVE + "prot: 1\n"),
        (
            "serve",
            SERVE + "routing: {aliases: {a: base}, health: {failures: 1}}\n",
            SERVE + "routing: {health: {failurs: 1}}\n",
        ),
    ],
)
def test_the_schema_is_for_editors(kind: str, good: str, bad: str) -> None:
    """It lets right files through and refuses others, also below `routing`."""
    schema = printed(kind)
    jsonschema.validate(yaml.safe_load(good), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(bad), schema)


def test_the_schema_of_serve_says_what_routing_is() -> None:
    """In words, and with all its settings."""
    schema = printed("serve")
    assert schema["properties"]["routing"]["description"]
    assert {"aliases", "keys", "results"} <= schema["$defs"]["Routing"]["properties"].keys()
