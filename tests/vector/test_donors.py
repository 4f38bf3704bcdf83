"""vllm_rvec.vector.donors: two checkpoints, matched tensor by tensor."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.support.checkpoints import make_family, tensors
from tests.support.variations import with_tensors
from vllm_rvec.checkpoint.fetch import Located
from vllm_rvec.errors import CheckpointError
from vllm_rvec.vector.donors import DonorReader, match_donors

if TYPE_CHECKING:
    from tests.support.checkpoints import Family

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("untied"), tied=False)


def without_head(donor: Path, folder: Path) -> Path:
    stored = tensors(donor)
    del stored[HEAD]
    return with_tensors(donor, folder, stored)


def names(tuned: Path, base: Path) -> dict[str, tuple[str, str]]:
    with DonorReader(Located.local(tuned)) as one, DonorReader(Located.local(base)) as other:
        return {pair.name: (pair.tuned, pair.base) for pair in match_donors(one, other)}


@pytest.mark.parametrize("side", ["tuned", "base"])
def test_the_bare_model_of_an_untied_one_has_no_head(
    untied: Family, tmp_path: Path, side: str
) -> None:
    """Its embedding is not its head: their difference would be that of two other matrices."""
    bare = without_head(getattr(untied, side), tmp_path / "bare")
    donors = (bare, untied.base) if side == "tuned" else (untied.tuned, bare)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: only in"):
        names(*donors)


def test_two_bare_models_match_without_a_head(untied: Family, tmp_path: Path) -> None:
    """The vector says nothing of it."""
    bare = (
        without_head(untied.tuned, tmp_path / "tuned"),
        without_head(untied.base, tmp_path / "base"),
    )
    found = names(*bare)
    assert EMBEDDING in found
    assert HEAD not in found


def test_a_head_with_a_prefix_is_a_head(family: Family, untied: Family, tmp_path: Path) -> None:
    """Not a second embedding, where the other donor is tied."""
    stored = tensors(untied.tuned)
    stored[f"model.{HEAD}"] = stored.pop(HEAD)
    found = names(with_tensors(untied.tuned, tmp_path / "tuned", stored), family.base)
    assert found[HEAD] == (f"model.{HEAD}", EMBEDDING)
    assert found[EMBEDDING] == (EMBEDDING, EMBEDDING)


@pytest.mark.parametrize("name", ["a:b", "", "a\x1b[2J", "deep"])
def test_tensors_that_no_vector_can_have_are_refused_at_once(
    family: Family, tmp_path: Path, name: str
) -> None:
    """Before anything is computed, and by name."""
    extra = torch.zeros([1] * 9 if name == "deep" else 1)
    donor = with_tensors(family.base, tmp_path / "odd", tensors(family.base) | {name: extra})
    with pytest.raises(CheckpointError, match="no vector can have") as caught:
        DonorReader(Located.local(donor))
    assert len(caught.value.problems) == 1


def test_names_that_are_no_text_are_escaped(family: Family, tmp_path: Path) -> None:
    """Folders, architectures: a manifest is UTF-8."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/tuned\xff"))
    shutil.copytree(family.tuned, folder)
    config = json.loads((folder / "config.json").read_text())
    changed = {"architectures": ["\ud800"], "model_type": "\udc00"}
    (folder / "config.json").write_text(json.dumps(config | changed))
    with DonorReader(Located.local(folder)) as donor:
        assert donor.architecture == "\\ud800"
        assert donor.model_type == "\\udc00"
        assert donor.describe().id == "tuned\\udcff"
