"""The model card of a merged checkpoint: what it was made of, and how. Imports no torch."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from vllm_rvec.checkpoint.model_card import read_front_matter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_rvec.checkpoint.fetch import Located
    from vllm_rvec.vector.manifest import Donor, Manifest
    from vllm_rvec.vector.recipe import RecipeVector

__all__ = ["Ingredient", "merged_card"]

MAX_SHOWN = 200
"""Characters of an id or a licence that are shown: they come from files of others."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

LICENSE_KEYS = ("license", "license_name", "license_link")

CARD = """\
---
{front_matter}---

# {title}

{target} with {what} added to its weights, tensor by tensor:

    merged = {formula}

each alpha, product and sum in float32, rounded once to the dtype of the target's tensor. A tensor
to which nothing is added is the target's, byte for byte.

|  | id | revision | alpha | blake3 of vector.json |
| --- | --- | --- | --- | --- |
{rows}
{recipe}
{donors}

Made by {tool} on {created} with `vllm-rvec merge`, vocabulary policy `{vocabulary}`.
"""


RECIPE = """
Of each vector, alpha times what this recipe says was added, and where it says so:

{block}"""


@dataclass(frozen=True, slots=True)
class Ingredient:
    """One vector of a merge."""

    vector: Located
    alpha: float
    manifest: Manifest
    manifest_blake3: str
    """Digest of its vector.json, in hexadecimal."""
    recipe: RecipeVector | None = None
    """Where in the model it was added, and how much of it, times `alpha`; all of it where None."""


def merged_card(
    title: str,
    target: Located,
    ingredients: Sequence[Ingredient],
    vocabulary: str,
    *,
    created: str,
    tool: str,
) -> str:
    """Write a merged checkpoint's README.md.

    Args:
        title: What the checkpoint is called.
        target: What the vectors were added to. Its own card's licence is kept.
        ingredients: The vectors, in the order of adding.
        vocabulary: The policy for embedding rows.
        created: Date and time.
        tool: Name and version of the writer.
    """
    return CARD.format(
        front_matter=yaml.safe_dump(_front_matter(target), sort_keys=False, allow_unicode=True),
        title=_plain(title),
        target=_code(target.id),
        what="a stored vector" if len(ingredients) == 1 else f"{len(ingredients)} stored vectors",
        formula=_formula(len(ingredients)),
        rows="\n".join(_rows(target, ingredients)),
        recipe=_recipe(ingredients),
        donors="\n".join(_donor_lines(ingredients)),
        tool=tool,
        created=created,
        vocabulary=vocabulary,
    )


def _front_matter(target: Located) -> dict[str, Any]:
    found = read_front_matter(target.folder)
    is_on_hub = target.revision is not None and HUB_ID.fullmatch(target.id)
    return {
        **({"base_model": [target.id], "base_model_relation": "merge"} if is_on_hub else {}),
        **{key: _plain(found[key]) for key in LICENSE_KEYS if isinstance(found.get(key), str)},
        "library_name": "transformers",
        "tags": ["merge", "task-arithmetic", "vllm-rvec"],
    }


def _formula(count: int) -> str:
    total = "theta"
    for number in range(1, count + 1):
        suffix = str(number) if count > 1 else ""
        total = f"{f'({total})' if number > 1 else total} + alpha{suffix} * v{suffix}"
    return total


def _rows(target: Located, ingredients: Sequence[Ingredient]) -> list[str]:
    rows = [("target", target, "", "")]
    for number, ingredient in enumerate(ingredients, 1):
        name = f"v{number}" if len(ingredients) > 1 else "v"
        rows.append((name, ingredient.vector, repr(ingredient.alpha), ingredient.manifest_blake3))
    return [
        f"| {name} | {_code(where.id)} | {_code(where.revision)} | {alpha} | {_code(digest)} |"
        for name, where, alpha, digest in rows
    ]


def _recipe(ingredients: Sequence[Ingredient]) -> str:
    """Show what was said of the vectors, as a file for `--recipe` has it; names in place of paths.

    YAML escapes what a terminal would act on, and a block of code is not Markdown.
    """
    said = [
        each.recipe.model_dump(mode="json", exclude_unset=True) | {"path": _plain(each.vector.id)}
        for each in ingredients
        if each.recipe is not None
    ]
    if not said:
        return ""
    text = yaml.safe_dump({"vectors": said}, sort_keys=False, default_flow_style=None)
    return RECIPE.format(block=textwrap.indent(text, "    "))


def _donor_lines(ingredients: Sequence[Ingredient]) -> list[str]:
    lines = []
    for number, ingredient in enumerate(ingredients, 1):
        name = f"v{number}" if len(ingredients) > 1 else "v"
        donors = ingredient.manifest.donors
        sides = f"tuned {_described(donors.tuned)}, base {_described(donors.base)}"
        lines.append(f"- {name} = `{ingredient.manifest.formula}` with {sides}")
    return lines


def _described(donor: Donor) -> str:
    revision = f" at {_code(donor.revision)}" if donor.revision else ""
    licence = f" (licence {_code(donor.license)})" if donor.license else ""
    return _code(donor.id) + revision + licence


def _plain(text: str) -> str:
    """Take out what Markdown, a table or a terminal would act on."""
    return " ".join(re.sub(r"[^\w./@:+ -]", " ", text).split())[:MAX_SHOWN]


def _code(text: str | None) -> str:
    return f"`{_plain(text)}`" if text and _plain(text) else ""
