"""The examples of routing are right, whole, and explained in the router's reference."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import pytest
from pydantic import BaseModel

from vllm_rvec.cli.check_config import check_config_command
from vllm_rvec.cli.routing import routing_of
from vllm_rvec.router import RouteConfig, Routing, load_route_config
from vllm_rvec.serve import load_config

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
ROUTE = ROOT / "examples" / "routing" / "route.yaml"
SERVE = ROOT / "examples" / "routing" / "serve.yaml"
REFERENCE = (ROOT / "vllm_rvec" / "router" / "README.md").read_text()


def settings_in(annotation: object) -> Iterator[type[BaseModel]]:
    """Every kind of settings that a type holds, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from settings_in(field.annotation)
    for inner in get_args(annotation):
        yield from settings_in(inner)


def fields_of(model: type[BaseModel]) -> set[str]:
    return {name for kind in settings_in(model) for name in kind.model_fields}


def test_the_example_of_route_is_right() -> None:
    """Its loader takes it, and finds variants with engines of their own and of the dial."""
    config = load_route_config(ROUTE)
    assert list(config.variants) == ["base", "enhanced@1", "enhanced@0.5"]
    dial = config.made_dial()
    assert dial is not None
    assert list(dial.variants) == ["enhanced@0.5"]
    assert not config.aliases["default"].is_split


def test_the_example_of_serve_is_right() -> None:
    """Its loaders take it, fused too, and its files are there."""
    settings = load_config(SERVE, {})
    assert Path(settings.model, "config.json").is_file()
    assert Path(settings.recipe[0].path, "vector.json").is_file()
    routing = routing_of(settings, SERVE, is_dial=False)
    assert set(routing.aliases["assistant"].split) < set(settings.variants)


@pytest.mark.parametrize("path", [ROUTE, SERVE], ids=lambda path: path.stem)
def test_check_config_takes_the_examples(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As what they are."""
    check_config_command(path, None)
    assert f"right for `vllm-rvec {path.stem}`" in capsys.readouterr().out


def test_the_example_of_route_shows_every_setting() -> None:
    """Each name that its file may hold; one at least in a comment."""
    words = set(re.findall(r"\w+", ROUTE.read_text()))
    assert not fields_of(RouteConfig) - words


def test_the_example_of_serve_shows_every_part_of_routing() -> None:
    """Each name that may stand right under `routing`."""
    words = set(re.findall(r"\w+", SERVE.read_text()))
    assert not set(Routing.model_fields) - words


def test_every_setting_is_in_the_reference() -> None:
    """With its name as code."""
    assert not {name for name in fields_of(RouteConfig) if f"`{name}`" not in REFERENCE}


def test_the_reference_shows_the_whole_example() -> None:
    """The file itself is linked; nobody has to keep two of them alike."""
    assert "(../../examples/routing/route.yaml)" in REFERENCE
    assert "(../../examples/routing/serve.yaml)" in REFERENCE
