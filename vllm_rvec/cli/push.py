"""`vllm-rvec push`."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_rvec.cli.locating import find_vector
from vllm_rvec.cli.progress import show_progress

if TYPE_CHECKING:
    from vllm_rvec.vector import VectorReader
    from vllm_rvec.vector.hub import Pushed

__all__ = ["push_command"]


def push_command(
    vector: Annotated[str, typer.Argument(help="The vector: folder, Hub id\\[@revision] or URL.")],
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub; made if there is none.")],
    *,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private; refuse a public one.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(metavar="BRANCH", help="Branch, made if there is none; main if not given."),
    ] = None,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Put a vector on the Hugging Face Hub, in one commit, with a model card.

    Logs in with HF_TOKEN, or with what `hf auth login` stored. HF_ENDPOINT names another Hub.
    """
    from vllm_rvec.vector.hub import open_whole, upload  # noqa: PLC0415 - torch, two seconds

    folder = find_vector(vector).folder
    with show_progress("verifying") as on_progress:
        opened = open_whole(folder, on_progress)
    done = upload(opened, repo, private=private, revision=revision, message=message)
    if as_json:
        typer.echo(json.dumps(_facts(opened, done)))
        return
    # Lines, not a table: they are made to be copied.
    for line in _summary(done):
        typer.echo(line)


def _facts(opened: "VectorReader", done: "Pushed") -> dict[str, object]:
    return {
        "vector": str(opened.folder),
        "repo": done.repo,
        "url": done.url,
        "commit": done.commit,
        "size_bytes": opened.manifest.size_bytes,
    }


def _summary(done: "Pushed") -> list[str]:
    fixed = f"{done.repo}@{done.commit}"
    return [
        f"pushed to {done.url}",
        f"check:  vllm-rvec check {fixed} --target TARGET",
        f"serve:  python -m vllm_rvec.serve --model TARGET --vector {fixed}",
    ]
