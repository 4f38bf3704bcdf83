"""`vllm-rvec transform`."""

from pathlib import Path
from typing import Annotated, Literal

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
from vllm_rvec.errors import ConfigError

__all__ = ["transform_command"]


def transform_command(  # noqa: PLR0917 - typer passes every option by name
    vector: Annotated[
        str, typer.Argument(help="The stored vector: folder, Hub id\\[@revision] or URL.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to make; must not exist.")],
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Keep the tensors whose names match, as '*.mlp.*'; may be given several times.",
            show_default="all",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Leave these out, whatever --include says; may be given several times.",
            show_default="none",
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            metavar="D", help="Keep the share D of each tensor that is largest (TIES): (0, 1]."
        ),
    ] = None,
    dare: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            help="Drop each element with probability P, multiply the rest by 1 / (1 - P): [0, 1).",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="S", help="Of --dare, which needs one.")] = (
        None
    ),
    rescale: Annotated[
        str | None,
        typer.Option(
            metavar="F|norm",
            help="Multiply by F; or norm: give each tensor the norm from before density and dare.",
        ),
    ] = None,
    encoding: EncodingOption = "auto",
    dtype: DtypeOption = None,
    rank: RankOption = 16,
    as_json: JsonOption = False,
) -> None:
    """Change a stored vector: select tensors, keep the largest, drop at random, rescale.

    In this order, whatever the order of the options. Tensors left out become zero.
    """
    from vllm_rvec.vector.derive.transform import transform  # noqa: PLC0415 - torch, two seconds

    located, factor = find_vector(vector), _factor(rescale)
    with show_progress("transforming") as on_progress:
        made = transform(
            located,
            output,
            density=density,
            dare=dare,
            seed=seed,
            rescale=factor,
            include=include or (),
            exclude=exclude or (),
            encoding=encoding,
            dtype=dtype,
            rank=rank,
            on_progress=on_progress,
        )
    show_derivation(made, as_json=as_json)


def _factor(rescale: str | None) -> float | Literal["norm"] | None:
    if rescale is None:
        return None
    if rescale == "norm":
        return "norm"
    try:
        return float(rescale)
    except ValueError as exc:
        raise ConfigError(f"--rescale {rescale}: a number, or norm") from exc
