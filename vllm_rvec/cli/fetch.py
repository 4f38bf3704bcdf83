"""`vllm-rvec fetch`."""

import json
from typing import Annotated

import typer

from vllm_rvec.cli.locating import find_vector
from vllm_rvec.vector.reader import VectorReader

__all__ = ["fetch_command"]


def fetch_command(
    vector: Annotated[str, typer.Argument(help="The vector: folder, Hub id\\[@revision] or URL.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Have a vector on this machine, and print its folder: what later commands need no network for.

    Exits with 9 where the network, the server or the disk failed: run it again, and it goes on
    where it stopped.
    """
    located = find_vector(vector)
    reader = VectorReader(located.folder)
    if not as_json:
        typer.echo(located.folder)
        return
    facts = {
        "vector": located.id,
        "revision": located.revision,
        "folder": str(located.folder),
        "digest": reader.manifest.digest,
        "size_bytes": reader.manifest.size_bytes,
    }
    typer.echo(json.dumps(facts))
