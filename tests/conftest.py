"""Checkpoints that many tests read and none writes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family

# Nothing here may wait for a hub; and engines of one machine share two cores.
os.environ["HF_HUB_OFFLINE"] = "1"

# Nor may a busy machine be taken for a fault.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's own cache folder out of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True, scope="session")
def _short_kernels() -> None:
    """One thread for tiny tensors: threads that wait for each other cost most of a busy machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Two donors and a target: tiny Qwen2 models with tied embeddings, bf16."""
    from tests.support.checkpoints import make_family

    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def vector(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family's vector, float32."""
    from tests.support.checkpoints import make_vector

    return make_vector(family, tmp_path_factory.mktemp("vector") / "float32")


@pytest.fixture(scope="session")
def vector_bf16(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family's vector, bfloat16."""
    from tests.support.checkpoints import make_vector

    return make_vector(family, tmp_path_factory.mktemp("vector") / "bfloat16", "bfloat16")


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    """Donors and a target of every architecture in tests/support/families.py."""
    from tests.support.families import make_families

    return make_families(tmp_path_factory.mktemp("families"))
