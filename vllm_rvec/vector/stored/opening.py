"""From a tensor's parts to a `StoredTensor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_rvec.vector.layout import BITMAP, GAPS, INT8, LORA_A, LORA_B, SCALE, VALUES
from vllm_rvec.vector.stored.dense import DenseTensor
from vllm_rvec.vector.stored.int8 import Int8Tensor
from vllm_rvec.vector.stored.lowrank import LowRankTensor
from vllm_rvec.vector.stored.sparse import BitmapTensor, GapsTensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from vllm_rvec.vector.manifest import TensorEntry
    from vllm_rvec.vector.stored.tensor import StoredTensor

__all__ = ["open_stored"]


def open_stored(entry: TensorEntry, name: str, parts: Mapping[str, torch.Tensor]) -> StoredTensor:
    """Take a tensor as it is stored.

    Args:
        entry: Its manifest entry; not of a zero tensor.
        name: Its name.
        parts: Its parts by their names in the shard, of the shapes and dtypes that FORMAT.md says.
    """
    if entry.encoding == "dense":
        return DenseTensor(parts[name])
    if entry.encoding == "int8":
        return Int8Tensor(parts[name + INT8], parts[name + SCALE])
    if entry.encoding == "lowrank":
        return LowRankTensor(entry, parts[name + LORA_A], parts[name + LORA_B])
    values = parts[name + VALUES]
    if name + BITMAP in parts:
        return BitmapTensor(name, entry.shape, values, parts[name + BITMAP])
    return GapsTensor(name, entry.shape, values, parts[name + GAPS])
