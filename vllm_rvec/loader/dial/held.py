"""How a vector's matrix is held in the engine: as vLLM's own layer holds it, or as int8 per row."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn import functional

from vllm_rvec.vector.encodings.int8 import round_rows

if TYPE_CHECKING:
    from torch import nn

__all__ = ["HeldMatrix", "Int8Matrix", "LayerMatrix", "PlainMatrix"]

FEW_ROWS = 16
"""Up to so many, a product reads int8 as it is; for more, rows are decoded once for all of them."""
STEP_ROWS = 4096
"""Rows of a matrix that are decoded at a time."""


class HeldMatrix(Protocol):
    """v of one linear layer or embedding, [out, in]."""

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """V x: [n, in] -> [n, out], in the dtype of x."""

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of v in float32: [n] -> [n, in]."""


class LayerMatrix:
    """v in a layer of vLLM's, with the kernels and the packing that theta has.

    Args:
        layer: Its weight is v.
        is_packed: Whether to lay it out for products now; else at the first one, since an
            embedding that is looked up only needs none.
    """

    def __init__(self, layer: nn.Module, *, is_packed: bool) -> None:
        self._layer: Any = layer
        self._is_packed = False
        if is_packed:
            self._pack()

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """V x: [n, in] -> [n, out], in the dtype of x."""
        if not self._is_packed:
            self._pack()
        product: torch.Tensor = self._layer.quant_method.apply(self._layer, x, None)
        return product

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of v in float32: [n] -> [n, in]."""
        return functional.embedding(ids, self._layer.weight).float()

    def _pack(self) -> None:
        self._layer.quant_method.process_weights_after_loading(self._layer)
        self._is_packed = True


class PlainMatrix:
    """v of one of PyTorch's own layers.

    Args:
        weight: v, [out, in].
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """V x: [n, in] -> [n, out], in the dtype of x."""
        return functional.linear(x, self._weight)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of v in float32: [n] -> [n, in]."""
        return functional.embedding(ids, self._weight).float()


class Int8Matrix:
    """v as int8 with one float32 scale a row: half of bfloat16's bytes.

    Args:
        matrix: v, [out, in], of any float dtype.
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        out, _ = matrix.shape
        self.codes = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
        self.scales = torch.empty(out, dtype=torch.float32, device=matrix.device)
        lost = kept = 0.0
        for at in range(0, out, STEP_ROWS):
            part = matrix[at : at + STEP_ROWS].float()
            codes, scales = round_rows(part)
            self.codes[at : at + STEP_ROWS] = codes.to(torch.int8)
            self.scales[at : at + STEP_ROWS] = scales
            lost += float((codes * scales.unsqueeze(1) - part).square().sum(dtype=torch.float64))
            kept += float(part.square().sum(dtype=torch.float64))
        self.relative_error = math.sqrt(lost / kept) if kept else 0.0
        """Frobenius norm of what was lost, over that of v."""

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """V x: [n, in] -> [n, out], in the dtype of x."""
        if len(x) <= FEW_ROWS and x.device.type == "cpu":
            product: torch.Tensor = torch._weight_int8pack_mm(  # noqa: SLF001 - PyTorch's only product with int8 rows
                x.contiguous(), self.codes, self.scales.to(x.dtype)
            )
            return product
        product = torch.empty((len(x), len(self.codes)), dtype=x.dtype, device=x.device)
        for at in range(0, len(self.codes), STEP_ROWS):
            part = self.codes[at : at + STEP_ROWS].to(x.dtype)
            product[:, at : at + STEP_ROWS] = functional.linear(x, part)
        return product.mul_(self.scales.to(x.dtype))

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of v in float32: [n] -> [n, in]."""
        return self.codes[ids].float() * self.scales[ids].unsqueeze(1)
