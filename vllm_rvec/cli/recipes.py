"""What a command adds to a target: vectors named by flags, or a recipe's file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_rvec.cli.locating import find_vector
from vllm_rvec.errors import ConfigError
from vllm_rvec.serve import ServeConfig
from vllm_rvec.vector.recipe_file import read_recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_rvec.checkpoint.fetch import Located
    from vllm_rvec.vector.recipe import RecipeVector

__all__ = ["Chosen", "RecipeOption", "choose_vectors"]

RecipeOption = Annotated[
    Path | None,
    typer.Option(
        help="In place of vectors: YAML with `vectors`, or the file of `serve` that has them."
    ),
]


@dataclass(frozen=True, slots=True)
class Chosen:
    """Vectors, found, and what is said of them."""

    vectors: list[Located]
    recipe: tuple[RecipeVector, ...]
    """One for each vector; empty where all of each is added."""
    vocabulary: str


def choose_vectors(
    vectors: Sequence[str] | None, recipe: Path | None, vocabulary: str | None
) -> Chosen:
    """Find the vectors that either the flags or a recipe's file name.

    Args:
        vectors: As the flags have them.
        recipe: The file, which may be serve's.
        vocabulary: The policy of the flag, which goes before the file's.

    Raises:
        ConfigError: Both are given, or none, or the file can't be used.
        VectorNotFoundError: There is no such vector.
    """
    if bool(vectors) == (recipe is not None):
        raise ConfigError(
            "vectors and a recipe are both given" if vectors else "no vector is given",
            fix="name vectors, or one file with --recipe",
        )
    if recipe is None:
        found = [find_vector(reference) for reference in vectors or ()]
        return Chosen(found, (), vocabulary or "strict")
    serves = {field.alias or name for name, field in ServeConfig.model_fields.items()}
    file = read_recipe(recipe, others=serves - {"vector"})
    found = [find_vector(vector.path) for vector in file.vectors]
    return Chosen(found, file.vectors, vocabulary or file.vocabulary)
