"""A recipe as a YAML file, for commands: the `vectors` of serve's file, and `vocabulary`.

Imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_rvec.errors import ConfigError
from vllm_rvec.vector.compatibility.structure import Vocabulary
from vllm_rvec.vector.recipe import Vectors
from vllm_rvec.vector.settings_file import beside, read_settings

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

__all__ = ["RecipeFile", "read_recipe", "vectors_beside"]


class RecipeFile(BaseModel):
    """What a recipe's file says."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    vectors: Vectors
    """What is added, in this order."""

    vocabulary: Vocabulary = "strict"
    """What to do where vector and target have different numbers of embedding rows."""


def read_recipe(path: Path, *, others: Collection[str] = ()) -> RecipeFile:
    """Read a recipe.

    Args:
        path: The file. A vector's relative path that exists beside it is taken from there.
        others: Keys that it may have as well, and that say nothing here: those of serve's file.

    Raises:
        ConfigError: The file can't be read, or some of it is wrong; all problems at once.
    """
    settings = read_settings(path)
    own = {
        key: value
        for key, value in settings.items()
        if key in RecipeFile.model_fields or key not in others
    }
    if "vectors" in own:
        own["vectors"] = vectors_beside(own["vectors"], path.parent)
    try:
        return RecipeFile.model_validate(own)
    except ValidationError as exc:
        raise ConfigError(
            f"the recipe {path} can't be used",
            problems=[_problem(error["loc"], error["msg"]) for error in exc.errors()],
            fix="write `vectors:` with one `- {path: VECTOR, alpha: 0.5}` a line",
            path=path,
        ) from None


def vectors_beside(vectors: object, folder: Path) -> object:
    """Take relative paths of unchecked `vectors` from a file's folder, as `beside` does."""
    if not isinstance(vectors, list):
        return vectors
    return [
        vector | {"path": beside(vector["path"], folder)}
        if isinstance(vector, dict) and "path" in vector
        else vector
        for vector in vectors
    ]


def _problem(location: tuple[int | str, ...], message: str) -> str:
    name = ".".join(map(str, location))
    match message:
        case "Field required":
            return f"`{name}` is missing"
        case "Extra inputs are not permitted":
            return f"`{name}` is not a setting"
        case _ if message.endswith("or instance of RecipeVector"):
            return f"`{name}`: should be a mapping with `path`"
        case _:
            said = message.removeprefix("Value error, ").removeprefix("Input ")
            return f"`{name}`: {said.replace('a valid tuple', 'a list')}"
