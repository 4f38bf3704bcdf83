"""vllm_rvec.vector.recipe_file: a recipe as commands read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vllm_rvec.errors import ConfigError
from vllm_rvec.vector.recipe_file import read_recipe

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


def test_paths_beside_the_file_are_taken_from_there(file: Path, tmp_path: Path) -> None:
    """Whatever the working directory; Hub ids and URLs stay as they are."""
    (tmp_path / "one").mkdir()
    paths = ["one", "owner/two", "https://host.test/three?sig=1"]
    file.write_text("vectors:\n" + "".join(f"  - path: {path}\n" for path in paths))
    found = read_recipe(file)
    assert [vector.path for vector in found.vectors] == [str(tmp_path / "one"), *paths[1:]]
    assert found.vocabulary == "strict"


def test_keys_of_another_reader_are_passed_over(file: Path) -> None:
    """Only those that are named; never the recipe's own."""
    file.write_text("port: 1\nvocabulary: common\nvectors: [{path: v}]\n")
    assert read_recipe(file, others=["port", "vocabulary"]).vocabulary == "common"
    with pytest.raises(ConfigError) as caught:
        read_recipe(file)
    assert caught.value.problems == ("`port` is not a setting",)


def test_all_problems_come_at_once_and_quote_nothing(file: Path) -> None:
    """By the names that the file uses; a path may hold a secret."""
    file.write_text(
        "vocabulary: some\nvectors:\n"
        "  - {path: [sesame]}\n  - {alpha: x}\n  - {path: v, layers: 5-3}\n  - sesame\n"
    )
    with pytest.raises(ConfigError, match=r"recipe\.yaml can't be used") as caught:
        read_recipe(file)
    numbers = "a number, a list of numbers, or a mapping from kinds of module to these"
    assert caught.value.problems == (
        "`vectors.0.path`: should be a valid string",
        "`vectors.1.path` is missing",
        f"`vectors.1.alpha`: should be {numbers}",
        "`vectors.2.layers`: '5-3' is no layer or range of layers; write 8-20 or 0-3,8",
        "`vectors.3`: should be a mapping with `path`",
        "`vocabulary`: should be 'strict', 'common' or 'skip-embeddings'",
    )
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "vectors:\n", "vectors: []\n", "vectors: v\n"])
def test_a_recipe_has_vectors(file: Path, text: str) -> None:
    """One at least."""
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_recipe(file)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith("`vectors`")
