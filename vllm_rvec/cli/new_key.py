"""`vllm-rvec new-key`."""

import json
from typing import Annotated

import typer

__all__ = ["new_key_command"]


def new_key_command(
    *,
    name: Annotated[str, typer.Option(help="Whose key it is: its name in `keys:`.")] = "team-a",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Make a key for a client of the router, and the lines that let it in.

    The key is printed once, on stdout, and stored nowhere. The configuration gets its hash only.
    """
    from vllm_rvec.router.config import is_name  # noqa: PLC0415
    from vllm_rvec.router.keyring import make_key  # noqa: PLC0415 - aiohttp, half a second

    if not is_name(name):
        problem = "a name is printable ASCII text without spaces or commas"
        raise typer.BadParameter(problem, param_hint="--name")
    key, sha256 = make_key()
    if as_json:
        lines = _config_lines(name, sha256)
        typer.echo(json.dumps({"name": name, "key": key, "sha256": sha256, "config": lines}))
        return
    typer.echo("The key, for the client; it is not shown again:", err=True)
    typer.echo(key)
    typer.echo("For the router's configuration:", err=True)
    typer.echo(_config_lines(name, sha256), nl=False, err=True)


def _config_lines(name: str, sha256: str) -> str:
    import yaml  # noqa: PLC0415 - only this command needs it

    # YAML's own writer: it knows that a client called `no` needs quotes.
    entry = {"keys": {name: {"sha256": sha256}}}
    return yaml.safe_dump(entry, default_flow_style=None, width=1000, allow_unicode=True)
