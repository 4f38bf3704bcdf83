"""Stored tensors, views of weights and parts of parameters, for tests of how these are added."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_rvec.vector.manifest import TensorEntry
from vllm_rvec.vector.stored import PaddedTensor, StoredTensor
from vllm_rvec.vector.stored.dense import DenseTensor
from vllm_rvec.vector.stored.int8 import Int8Tensor
from vllm_rvec.vector.stored.lowrank import LowRankTensor
from vllm_rvec.vector.stored.sparse import BitmapTensor, GapsTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "SHAPE",
    "VIEWS",
    "assert_same_bits",
    "make_stored",
    "outputs",
    "stored_bytes",
    "weights",
]

SHAPE = (67, 48)

VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "all": lambda t: t,
    "rows": lambda t: t[5:60],
    "columns": lambda t: t[:, 7:31],
    "a row": lambda t: t[9],
    "a column": lambda t: t[:, 3],
    "every other row": lambda t: t[1::2],
    "every other column": lambda t: t[:, ::2],
    "transposed": lambda t: t.t(),
    "a transposed part": lambda t: t[3:20, 8:40].t(),
    "flat": lambda t: t.reshape(-1)[100:3000],
    "expanded": lambda t: t[4].expand(30, 48),
    "three axes": lambda t: t[:66].view(11, 6, 48)[2:9, 1:4, 5:44],
    "three axes, moved": lambda t: t[:66].view(11, 6, 48).permute(2, 0, 1),
    "nothing": lambda t: t[3:3],
    "one": lambda t: t[3, 4],
}


def stored_bytes(tensor: StoredTensor) -> int:
    """What a tensor takes in its file."""
    return sum(part.nbytes for part in tensor.compact(0, tensor.elements).tensors)


def make_stored(
    kind: str, shape: tuple[int, int] = SHAPE, seed: int = 7
) -> tuple[StoredTensor, torch.Tensor]:
    """Make a stored tensor, and what it decodes to on the CPU, decoded whole."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(shape, generator=generator) * 0.1
    made = _made(kind, v, generator)
    whole = made.read(0, made.elements).view(made.shape)
    if kind in {"gaps", "bitmap", "dense"}:
        assert not torch.equal(whole, torch.zeros_like(whole))
    return made, whole


def _made(  # noqa: PLR0911 - one for each kind
    kind: str, v: torch.Tensor, generator: torch.Generator
) -> StoredTensor:
    shape = (v.shape[0], v.shape[1])
    match kind:
        case "dense":
            return DenseTensor(v.bfloat16())
        case "dense_f32":
            return DenseTensor(v)
        case "int8":
            scales = v.abs().amax(dim=1) / 127
            return Int8Tensor((v / scales.unsqueeze(1)).round().to(torch.int8), scales)
        case "lowrank":
            lora_a, lora_b = v[:4].contiguous(), v[:, :4].contiguous()
            entry = TensorEntry(shape=shape, dtype="F32", encoding="lowrank", scaling=0.5)
            return LowRankTensor(entry, lora_a, lora_b)
        case "padded":
            return PaddedTensor(_made("gaps", v, generator), (shape[0] + 9, shape[1]), 0.0)
    changed = (torch.rand(shape, generator=generator) < 0.1).view(-1)
    changed[:50], changed[-50:] = False, False
    if kind == "bitmap":
        packed = np.packbits(changed.numpy(), bitorder="little")
        bits = np.zeros(-(-packed.size // 8) * 8, dtype=np.uint8)
        bits[: packed.size] = packed
        return BitmapTensor("w", shape, v.bfloat16().view(-1)[changed], torch.from_numpy(bits))
    gaps = changed.nonzero().view(-1).diff(prepend=torch.tensor([-1])) - 1
    return GapsTensor("w", shape, v.bfloat16().view(-1)[changed], gaps.to(torch.uint8))


def weights(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Make weights among which are both zeros."""
    theta = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    theta.view(-1)[::7], theta.view(-1)[::11] = -0.0, 0.0
    return theta.to(dtype)


def outputs(
    shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield parameters full of fives, and the part of each that is to be written."""
    rows, columns = shape
    sizes = (rows + 4, columns + 6), (rows + 5, columns), (columns, rows), (rows, columns, 2)
    packed, longer, turned, apart = (
        torch.full(size, 5.0, dtype=dtype, device=device) for size in sizes
    )
    yield packed, packed[2:-2, 3:-3]
    yield longer, longer[2:-3]
    yield turned, turned.t()
    yield apart, apart[..., 1]


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare on the CPU."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    same = [side.cpu().contiguous().view(-1).view(torch.uint8) for side in (found, expected)]
    assert torch.equal(*same)
