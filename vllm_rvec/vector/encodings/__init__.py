"""How a tensor of a vector is stored: dense, sparse, int8, lowrank, as FORMAT.md describes them.

Encoding reads its source in blocks, as often as it needs, so that a difference of two donors never
has to be in memory as a whole; only what is stored compactly is (sparse parts, bytes, factors).

Not here: decoding (`stored`), and which file the parts are in (`writer`, `reader`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from vllm_rvec.checkpoint.dtypes import DTYPE_NAMES
from vllm_rvec.errors import ConfigError
from vllm_rvec.vector.encodings.int8 import encode_int8
from vllm_rvec.vector.encodings.lowrank import encode_lowrank, is_worth_factors
from vllm_rvec.vector.encodings.parts import Encoded, Part, size_bytes
from vllm_rvec.vector.encodings.source import Measures, Rounded, Source, measure
from vllm_rvec.vector.encodings.sparse import encode_sparse, may_be_sparse

if TYPE_CHECKING:
    from vllm_rvec.vector.manifest import Encoding

__all__ = [
    "ENCODING_CHOICES",
    "Choice",
    "Encoded",
    "Measures",
    "Part",
    "Source",
    "encode",
    "measure",
]

ENCODING_CHOICES: Final = ("auto", "dense", "sparse", "int8", "lowrank")
"""What a user may ask for. auto takes the smallest lossless one, tensor by tensor."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What to store a tensor as."""

    encoding: str = "auto"
    """One of `ENCODING_CHOICES`. Where it can't be had (int8 of a scalar or a row, lowrank of
    what is no matrix or has no fewer numbers), the tensor is stored as auto does."""
    dtype: torch.dtype = torch.float32
    """What values are rounded to; auto narrows it where that loses nothing."""
    rank: int = 16
    """Of lowrank."""

    def __post_init__(self) -> None:
        if self.encoding not in ENCODING_CHOICES:
            raise ConfigError(
                f"--encoding {self.encoding}: choose one of {', '.join(ENCODING_CHOICES)}"
            )
        if self.rank < 1:
            raise ConfigError(f"--rank {self.rank}: a rank is 1 or more")


def encode(source: Source, choice: Choice, measures: Measures | None = None) -> Encoded:
    """Prepare a tensor for storing.

    Args:
        source: The exact tensor.
        choice: What to store it as.
        measures: What `measure(source, choice.dtype)` gives, where the caller has it already.

    Returns:
        Parts whose blocks are computed as they are read; their order is the order in the file.
    """
    measures = measures or measure(source, choice.dtype)
    if measures.stored == 0:
        return Encoded("zero", DTYPE_NAMES[choice.dtype], squared_error=measures.squared_norm)
    if choice.encoding == "int8" and len(source.shape) > 1:
        return encode_int8(source)
    if choice.encoding == "lowrank" and is_worth_factors(source.shape, choice.rank):
        return encode_lowrank(source, choice.rank, choice.dtype)
    return _encode_exactly(source, choice, measures)


def _encode_exactly(source: Source, choice: Choice, measures: Measures) -> Encoded:
    dtype = choice.dtype
    if choice.encoding != "dense" and measures.narrow is not None:
        dtype = measures.narrow
    parts: tuple[Part, ...] = (Part("", dtype, source.shape, Rounded(source, dtype)),)
    encoding: Encoding = "dense"
    is_asked_for = choice.encoding == "sparse"
    may_be = choice.encoding != "dense" and may_be_sparse(source.elements, measures.stored, dtype)
    if is_asked_for or may_be:
        sparse = encode_sparse(source, dtype, measures.stored)
        if is_asked_for or size_bytes(sparse) < size_bytes(parts):
            parts, encoding = sparse, "sparse"
    return Encoded(
        encoding,
        DTYPE_NAMES[dtype],
        parts,
        squared_norm=measures.squared_stored_norm,
        squared_error=measures.squared_error,
    )
