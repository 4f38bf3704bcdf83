"""A vector's files change under a load: an error that names them, never SIGBUS or a mixture."""

from __future__ import annotations

import itertools
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.support.checkpoints import make_merged, tensors
from vllm_rvec.errors import RvecError, VectorCorruptError
from vllm_rvec.vector import VectorReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.checkpoints import Family

ALPHA = 0.3


@pytest.fixture
def copy(vector: Path, tmp_path: Path) -> Path:
    """A vector that may be spoilt."""
    return shutil.copytree(vector, tmp_path / "vector")


def stream(target: Path, vector: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The loader's own stream, read a tensor at a time."""
    from vllm.model_executor.model_loader import get_model_loader

    from tests.support.vllm_model import engine_config

    config = engine_config(target, "rvec", {"vector": str(vector), "alpha": ALPHA}, "bfloat16")
    loader: Any = get_model_loader(config.load_config)
    found: Iterator[tuple[str, torch.Tensor]] = loader.get_all_weights(
        config.model_config, torch.nn.Module()
    )
    return found


def computed(weight: torch.Tensor) -> torch.Tensor:
    return torch.empty(weight.shape, dtype=torch.bfloat16).copy_(weight)


def shard_of(vector: Path) -> Path:
    return vector / "vector.safetensors"


def cut_short(shard: Path) -> None:
    os.truncate(shard, 4096)


def write_to(shard: Path) -> None:
    with shard.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(bytes(8))


def empty(shard: Path) -> None:
    os.truncate(shard, 0)


@pytest.mark.parametrize("change", [cut_short, write_to, empty])
def test_a_change_in_the_middle_of_a_load_is_an_error(
    family: Family, copy: Path, change: Callable[[Path], None]
) -> None:
    """Found before the next tensor is read, where a mapping would end the process."""
    weights = stream(family.target, copy)
    for _ in range(3):
        next(weights)
    change(shard_of(copy))
    with pytest.raises(VectorCorruptError, match=r"vector\.safetensors") as caught:
        list(weights)
    assert ("now" in caught.value.why) or ("written to" in caught.value.why)


@pytest.mark.parametrize("change", [cut_short, write_to, empty])
def test_a_change_before_a_held_back_copy_is_an_error(
    family: Family, copy: Path, change: Callable[[Path], None]
) -> None:
    """Online quantization and reloads copy later: reading what was cut off would be SIGBUS."""
    weights = dict(itertools.islice(stream(family.target, copy), 8))
    change(shard_of(copy))
    for weight in weights.values():
        with pytest.raises(VectorCorruptError, match="has changed while it was read"):
            computed(weight)


def test_a_model_that_loses_its_vector_half_way_is_not_loaded(family: Family, copy: Path) -> None:
    """By vLLM's own weight loaders, into a model's own parameters."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    from tests.support.vllm_model import CreatedModel, engine_config

    config = engine_config(family.target, "rvec", {"vector": str(copy)}, "bfloat16")
    created, loader = CreatedModel(config), get_model_loader(config.load_config)
    model: Any = created.model
    weights: Iterator[Any] = loader.get_all_weights(config.model_config, model)

    def cut_after_six() -> Iterator[Any]:
        yield from itertools.islice(weights, 6)
        cut_short(shard_of(copy))
        yield from weights

    with set_current_vllm_config(config), pytest.raises(VectorCorruptError):
        model.load_weights(cut_after_six())


def test_a_change_after_the_last_tensor_is_an_error(family: Family, copy: Path) -> None:
    """What has been copied may be of both files: such weights are not served."""
    weights = stream(family.target, copy)
    for _ in tensors(family.target):
        next(weights)
    write_to(shard_of(copy))
    with pytest.raises(VectorCorruptError, match="has changed while it was read"):
        next(weights)


@pytest.mark.parametrize("change", [cut_short, write_to, os.unlink])
def test_a_change_between_check_and_read_is_an_error(
    vector: Path, copy: Path, change: Callable[[Path], None]
) -> None:
    """The vector was opened, and nothing mapped yet."""
    reader = VectorReader(copy)
    change(shard_of(copy))
    with pytest.raises(VectorCorruptError, match="can't be read"):
        reader.tensor("model.norm.weight")


def test_a_file_that_is_replaced_between_check_and_read_is_an_error(
    vector: Path, copy: Path
) -> None:
    """Another file of the same size under the same name is not the one that was checked."""
    reader = VectorReader(copy)
    shutil.copy(shard_of(copy), copy / "new")
    (copy / "new").rename(shard_of(copy))
    with pytest.raises(VectorCorruptError, match="can't be read") as caught:
        reader.tensor("model.norm.weight")
    assert "replaced" in caught.value.why


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_removed_or_replaced_while_it_is_mapped_is_read_to_its_end(
    family: Family, copy: Path, tmp_path: Path, replaced: bool
) -> None:
    """What a mapping holds is what was checked; a new file under that name is for the next load."""
    expected = tensors(make_merged(family.target, copy, ALPHA, tmp_path / "merged", torch.bfloat16))
    weights = stream(family.target, copy)
    name, weight = next(weights)
    found = {name: computed(weight)}
    shard_of(copy).unlink()
    if replaced:
        shard_of(copy).write_bytes(b"something else")
    found |= {name: computed(weight) for name, weight in weights}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_vector_that_is_gone_before_the_load_is_named(family: Family, copy: Path) -> None:
    """Its folder, as the configuration names it."""
    weights = stream(family.target, copy)
    shutil.rmtree(copy)
    with pytest.raises(RvecError, match="vector"):
        next(weights)
