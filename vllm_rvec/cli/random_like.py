"""`vllm-rvec random-like`."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_rvec.cli.derivation import (
    DtypeOption,
    EncodingOption,
    JsonOption,
    RankOption,
    show_derivation,
)
from vllm_rvec.cli.locating import find_vector
from vllm_rvec.cli.progress import show_progress

__all__ = ["random_like_command"]


def random_like_command(  # noqa: PLR0917 - typer passes every option by name
    vector: Annotated[
        str, typer.Argument(help="The stored vector: folder, Hub id\\[@revision] or URL.")
    ],
    seed: Annotated[int, typer.Option(metavar="S", help="Another seed, another random vector.")],
    output: Annotated[Path, typer.Option(help="Folder to make; must not exist.")],
    permute: Annotated[
        bool,
        typer.Option(
            "--permute", help="Shuffle each tensor's own elements, in place of normal numbers."
        ),
    ] = False,
    encoding: EncodingOption = "auto",
    dtype: DtypeOption = None,
    rank: RankOption = 16,
    as_json: JsonOption = False,
) -> None:
    """Make a random vector with the norms of a stored one, the control of a comparison."""
    from vllm_rvec.vector.derive.random_like import random_like  # noqa: PLC0415 - torch, two seconds

    located = find_vector(vector)
    with show_progress("drawing") as on_progress:
        made = random_like(
            located,
            output,
            seed=seed,
            permute=permute,
            encoding=encoding,
            dtype=dtype,
            rank=rank,
            on_progress=on_progress,
        )
    show_derivation(made, as_json=as_json)
