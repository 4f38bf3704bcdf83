"""`vllm-rvec combine`."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_rvec.checkpoint.remote import shown
from vllm_rvec.cli.derivation import (
    DtypeOption,
    EncodingOption,
    JsonOption,
    RankOption,
    show_derivation,
)
from vllm_rvec.cli.locating import find_vector
from vllm_rvec.cli.progress import show_progress
from vllm_rvec.errors import ConfigError

__all__ = ["combine_command", "parse_terms"]


def combine_command(  # noqa: PLR0917 - typer passes every option by name
    vectors: Annotated[
        list[str],
        typer.Argument(
            metavar="VECTOR:WEIGHT...",
            help="Stored vectors, each with its weight: a:0.7 b:0.3. A vector is a folder, Hub "
            "id\\[@revision] or URL.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder to make; must not exist.")],
    encoding: EncodingOption = "auto",
    dtype: DtypeOption = None,
    rank: RankOption = 16,
    as_json: JsonOption = False,
) -> None:
    """Make one vector of several: their weighted sum, in float32, in the order given."""
    from vllm_rvec.vector.derive.combine import Term, combine  # noqa: PLC0415 - torch, two seconds

    terms = [Term(find_vector(name), weight) for name, weight in parse_terms(vectors)]
    with show_progress("combining") as on_progress:
        made = combine(
            terms,
            output,
            encoding=encoding,
            dtype=dtype,
            rank=rank,
            on_progress=on_progress,
        )
    show_derivation(made, as_json=as_json)


def parse_terms(texts: list[str]) -> list[tuple[str, float]]:
    """Split each text at its last colon: what stands before may hold colons too.

    Raises:
        ConfigError: A text is no VECTOR:WEIGHT; all such are named.

    >>> parse_terms(["runs/a:0.7", "team/b@v2:-1"])
    [('runs/a', 0.7), ('team/b@v2', -1.0)]
    """
    found, problems = [], []
    for text in texts:
        name, _, weight = text.rpartition(":")
        try:
            found.append((name, float(weight)))
        except ValueError:
            problems.append(shown(text))
            continue
        if not name:
            problems.append(shown(text))
    if problems:
        raise ConfigError(
            "not every vector has a weight",
            problems=problems,
            fix="write VECTOR:WEIGHT, as in runs/a:0.7; the last colon is the one that counts",
        )
    return found
