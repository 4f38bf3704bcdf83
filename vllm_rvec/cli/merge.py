"""`vllm-rvec merge`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_rvec.checkpoint.fetch import locate_checkpoint
from vllm_rvec.cli.printable import titled
from vllm_rvec.cli.progress import show_progress
from vllm_rvec.cli.recipes import Chosen, RecipeOption, choose_vectors
from vllm_rvec.errors import ConfigError

if TYPE_CHECKING:
    from vllm_rvec.vector.merge import Merge
    from vllm_rvec.vector.merged_card import Ingredient

__all__ = ["merge_command"]


def merge_command(  # noqa: PLR0917 - typer passes every option by name
    target: Annotated[
        str, typer.Option(help="The checkpoint to add to: folder or Hub id\\[@revision].")
    ],
    output: Annotated[Path, typer.Option(help="Folder to make; must not exist.")],
    vector: Annotated[
        list[str] | None,
        typer.Option(help="A stored vector: folder, Hub id\\[@revision] or URL. Once for each."),
    ] = None,
    recipe: RecipeOption = None,
    alpha: Annotated[
        list[float] | None,
        typer.Option(
            help="Scaling coefficient, once for each --vector, in their order, or once for all of "
            "a recipe, which it multiplies; 1 without any."
        ),
    ] = None,
    vocab: Annotated[
        str | None,
        typer.Option(
            show_default="strict",
            help="Where vector and target have different numbers of embedding rows: strict "
            "(refuse), common (add the shared rows), skip-embeddings (add nothing to embedding and "
            "output head, whatever their sizes).",
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Go on where `check` refuses; a tensor that does not fit stays the target's.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Write a checkpoint with vectors added: target + alpha * v, as plain safetensors."""
    from vllm_rvec.vector.merge import merge  # noqa: PLC0415 - torch, two seconds

    located = locate_checkpoint(target)
    chosen = choose_vectors(vector, recipe, vocab)
    with show_progress("merging") as on_progress:
        made = merge(
            located,
            chosen.vectors,
            output,
            alphas=_alphas(chosen, alpha or []),
            recipe=chosen.recipe,
            vocabulary=chosen.vocabulary,
            force=force,
            on_progress=on_progress,
        )
    if as_json:
        typer.echo(json.dumps(_facts(made)))
    else:
        Console().print(_summary(made))


def _alphas(chosen: Chosen, given: list[float]) -> list[float]:
    """Give each vector its alpha; a recipe has one for all."""
    if not chosen.recipe:
        return given
    if len(given) > 1:
        raise ConfigError(
            f"a recipe and {len(given)} alphas",
            why="--alpha multiplies the whole recipe; each vector's own alpha stands in the file",
            fix="give --alpha once, or not at all",
        )
    return given * len(chosen.vectors)


def _facts(made: "Merge") -> dict[str, object]:
    return {
        "output": str(made.output),
        "vectors": [
            {
                "id": each.vector.id,
                "revision": each.vector.revision,
                "alpha": each.alpha,
                "manifest_blake3": each.manifest_blake3,
                "recipe": _said(each),
            }
            for each in made.ingredients
        ],
        "tensors": made.tensors,
        "changed_tensors": made.changed_tensors,
        "changed_weights": made.changed_weights,
        "size_bytes": made.size_bytes,
        "carried": [path.name for path in made.companions.carried],
        "left_behind": list(made.companions.left_behind),
    }


def _said(each: "Ingredient") -> dict[str, object] | None:
    if each.recipe is None:
        return None
    return each.recipe.model_dump(mode="json", exclude_unset=True, exclude={"path"})


def _summary(made: "Merge") -> Table:
    table = Table(show_header=False, title=titled("checkpoint", made.output), title_justify="left")
    rows = [
        (f"{each.alpha:g} x", f"{each.vector.id} ({each.manifest_blake3[:12]}){_told(each)}")
        for each in made.ingredients
    ]
    rows += [
        ("tensors", f"{made.tensors:,} ({made.changed_tensors:,} changed)"),
        ("size", f"{made.size_bytes / 1e6:,.1f} MB"),
        ("carried over", ", ".join(path.name for path in made.companions.carried)),
        ("left behind", ", ".join(made.companions.left_behind) or "nothing"),
    ]
    for name, value in rows:
        table.add_row(name, Text(value))  # ids and names are not markup
    return table


def _told(each: "Ingredient") -> str:
    said = _said(each)
    return "".join(f", {name}: {json.dumps(value)}" for name, value in (said or {}).items())
