"""vllm_rvec.vector.merged_card: where a merged checkpoint came from."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from vllm_rvec.checkpoint.fetch import Located
from vllm_rvec.vector.manifest import Manifest
from vllm_rvec.vector.merged_card import Ingredient, merged_card
from vllm_rvec.vector.recipe import RecipeVector

if TYPE_CHECKING:
    from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DIGEST = "ab" * 32


def ingredient(vector: Path, alpha: float, name: str = "team/vector") -> Ingredient:
    return Ingredient(Located(vector, name, COMMIT), alpha, Manifest.read(vector), DIGEST)


def card_of(target: Located, *ingredients: Ingredient, title: str = "out") -> str:
    return merged_card(
        title, target, ingredients, "strict", created="2026-01-02T03:04:05+00:00", tool="tool 1"
    )


def front_matter(card: str) -> dict[str, Any]:
    _, text, _ = card.split("---\n", 2)
    found = yaml.safe_load(text)
    assert isinstance(found, dict)
    return found


def with_card(folder: Path, text: str) -> Located:
    (folder / "README.md").write_text(text)
    return Located(folder, "org/target", COMMIT)


def test_it_names_target_vector_alpha_digest_formula_and_donors(
    vector: Path, tmp_path: Path
) -> None:
    """All that is needed to make the same checkpoint again."""
    card = card_of(Located(tmp_path, "org/target", COMMIT), ingredient(vector, 0.3))
    assert f"| target | `org/target` | `{COMMIT}` |  |  |" in card
    assert f"| v | `team/vector` | `{COMMIT}` | 0.3 | `{DIGEST}` |" in card
    assert "merged = theta + alpha * v\n" in card
    assert "- v = `tuned - base` with tuned `tuned`, base `base`" in card
    assert "tool 1 on 2026-01-02T03:04:05+00:00" in card
    assert front_matter(card)["base_model"] == ["org/target"]


def test_several_vectors_stand_in_the_order_of_adding(vector: Path, tmp_path: Path) -> None:
    """Their sum depends on it."""
    both = ingredient(vector, 1.0, "a/one"), ingredient(vector, -0.5, "a/two")
    card = card_of(Located.local(tmp_path), *both)
    assert "merged = (theta + alpha1 * v1) + alpha2 * v2\n" in card
    assert card.index("| v1 | `a/one`") < card.index("| v2 | `a/two`")


def test_a_recipe_can_be_used_again(vector: Path, tmp_path: Path) -> None:
    """Word for word, but for paths: they are nobody's business. The whole vector has none."""
    said = {"path": "/home/me/v", "alpha": {"mlp": [0, 1], "default": 0.5}, "layers": "0-1"}
    part = replace(
        ingredient(vector, 0.3),
        recipe=RecipeVector.model_validate({**said, "include": ["*`{x} # <b>*"]}),
    )
    card = card_of(Located.local(tmp_path), part)
    (block,) = re.findall(r"^    vectors:\n(?:    .*\n)+", card, re.MULTILINE)
    assert yaml.safe_load(block)["vectors"] == [
        {**said, "path": "team/vector", "include": ["*`{x} # <b>*"]}
    ]
    assert "/home/me" not in card
    assert "this recipe" not in card_of(Located.local(tmp_path), ingredient(vector, 0.3))


def test_a_local_target_is_no_base_model(vector: Path, tmp_path: Path) -> None:
    """The Hub takes ids only; and a folder's path is nobody's business."""
    card = card_of(Located.local(tmp_path), ingredient(vector, 1.0))
    assert "base_model" not in front_matter(card)
    assert str(tmp_path.parent) not in card


def test_the_targets_licence_is_kept(vector: Path, tmp_path: Path) -> None:
    """With the name and link that a licence of one's own has on the Hub."""
    licence = {"license": "other", "license_name": "own", "license_link": "https://x.test/l"}
    target = with_card(tmp_path, f"---\n{yaml.safe_dump(licence)}tags: [a]\n---\n# Target\n")
    found = front_matter(card_of(target, ingredient(vector, 1.0)))
    assert {key: found[key] for key in licence} == licence
    assert "a" not in found["tags"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# no front matter\nlicense: mit\n",
        "---\nlicense: mit\n",
        "---\n- license\n---\n",
        "---\nlicense: [a\n---\n",
        "---\nlicense: {a: b}\n---\n",
        "---\nlicense: !!python/object/apply:os.system [ls]\n---\n",
        "---\n" + "[" * 2000 + "\n---\n",
    ],
)
def test_a_card_that_says_nothing_gives_no_licence(text: str, vector: Path, tmp_path: Path) -> None:
    """Cut off, no mapping, no YAML, no text, code: never a failure, and nothing is run."""
    found = front_matter(card_of(with_card(tmp_path, text), ingredient(vector, 1.0)))
    assert "license" not in found


def test_names_of_others_are_text_not_markup(vector: Path, tmp_path: Path) -> None:
    """An id can't add a table's row, a link, HTML or a key of the front matter."""
    name = "a/b` | x |\n| y\n---\nlicense: mit\n<script>[l](http://e.test)"
    card = card_of(Located(tmp_path, name, COMMIT), ingredient(vector, 1.0, name), title=name)
    body = card.split("---\n", 2)[2]
    assert "<script>" not in body
    assert "](" not in body
    assert body.count("\n| ") == 4
    assert "license" not in front_matter(card)
