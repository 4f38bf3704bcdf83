"""`vllm-rvec check-config`: is a file of `serve` or `route` right, before it is used?"""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_rvec.cli.routing import routing_of
from vllm_rvec.errors import ConfigError
from vllm_rvec.router import RouteConfig, Routing, load_route_config
from vllm_rvec.router.server import check_exposure
from vllm_rvec.serve import ServeConfig, choose_mode, load_config, plan_engines
from vllm_rvec.serve.config import CLIENT_KEY_VARIABLE
from vllm_rvec.vector.settings_file import read_settings

__all__ = ["check_config_command"]


def check_config_command(
    path: Annotated[
        Path | None, typer.Argument(help="The YAML file of `serve` or of `route`.")
    ] = None,
    schema: Annotated[
        str | None,
        typer.Option(help="Print the JSON schema for editors instead: of serve, or of route."),
    ] = None,
) -> None:
    """Check a configuration and start nothing; all that is wrong with it is said at once.

    Which kind of file it is shows by `model`, which only `serve` has.
    """
    if schema is not None:
        typer.echo(json.dumps(_schema(schema), indent=2))
        return
    if path is None:
        raise ConfigError("there is nothing to check", fix="name a file, or --schema serve")
    has_key = bool(os.environ.get(CLIENT_KEY_VARIABLE))
    kind = "serve" if "model" in read_settings(path) else "route"
    if kind == "serve":
        _check_serve(path, has_key=has_key)
    else:
        config = load_route_config(path)
        check_exposure(config.host, config, has_shared_key=has_key)
    typer.echo(f"{path} is right for `vllm-rvec {kind}`")


def _check_serve(path: Path, *, has_key: bool) -> None:
    settings = load_config(path, {})
    mode = choose_mode(settings).mode
    routing = routing_of(settings, path, is_dial=mode == "dial")
    plan_engines(settings, mode=mode)
    has_key = has_key or settings.api_key is not None
    check_exposure(settings.host, routing, has_shared_key=has_key)


def _schema(kind: str) -> dict[str, Any]:
    if kind == "route":
        return RouteConfig.model_json_schema()
    if kind != "serve":
        raise ConfigError(f"there is no schema of {kind!r}", fix="say serve or route")
    whole = ServeConfig.model_json_schema()
    inner = Routing.model_json_schema(ref_template="#/$defs/{model}")
    whole["$defs"] = {**whole.get("$defs", {}), **inner.pop("$defs", {}), "Routing": inner}
    said = whole["properties"]["routing"].get("description", Routing.__doc__)
    whole["properties"]["routing"] = {"$ref": "#/$defs/Routing", "description": said}
    return whole
