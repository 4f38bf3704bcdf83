"""Engines of every architecture: fused at load, each answers as the merged checkpoint does.

Greedy, bfloat16, on one rank; tokens and log-probabilities, bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.checkpoints import make_merged, make_vector
from tests.support.engines import answers
from tests.support.families import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.checkpoints import Family

pytestmark = pytest.mark.engine

ALPHA = 0.3


@pytest.fixture(scope="module")
def replies(
    families: dict[str, Family], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Any]]:
    """What the target, the merged checkpoint and the fused target of each family answer."""
    engines = [
        engine
        for name, family in families.items()
        for engine in _engines(name, family, tmp_path_factory.mktemp(f"{name}-engines"))
    ]
    found = iter(answers(engines))
    return {name: [next(found) for _ in range(3)] for name in families}


def _engines(name: str, family: Family, folder: Path) -> Iterator[dict[str, Any]]:
    vector = make_vector(family, folder / "vector")
    merged = make_merged(family.target, vector, ALPHA, folder / "merged")
    extra = {"vector": str(vector), "alpha": ALPHA}
    common: dict[str, Any] = {"dtype": "bfloat16"}
    if KINDS[name].is_multimodal:
        common["limit_mm_per_prompt"] = {"image": 0}
    yield common | {"model": str(family.target)}
    yield common | {"model": str(merged)}
    yield common | {
        "model": str(family.target),
        "load_format": "rvec",
        "model_loader_extra_config": extra,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_engine_answers_as_a_merged_one(replies: dict[str, list[Any]], kind: str) -> None:
    """The same tokens with the same log-probabilities, which are not those of the target."""
    plain, merged, fused = replies[kind]
    assert [len(reply["tokens"]) for reply in fused] == [12, 12]
    assert fused == merged
    assert fused != plain
