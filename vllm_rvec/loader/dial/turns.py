"""Which alphas the rows of a batch have, and how a vector's part is added to them.

Rows at alpha 0 are left out, not multiplied by zero: they keep the target's own bits, and cost
nothing. Everything here is done once for a step of the engine, not once for each layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Turn", "Turns"]


@dataclass(frozen=True, slots=True)
class Turn:
    """The rows at which some vectors have an alpha other than 0."""

    rows: torch.Tensor | None
    """int64 [n], ascending; None for all rows, however many there are."""
    alphas: torch.Tensor
    """float32 [n, vectors]; [1, vectors] where all rows have the same."""
    uniform: tuple[float, ...] | None
    """The same, as numbers, where all these rows have the same alphas."""

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """Take these rows of `x` [rows, ...]."""
        return x if self.rows is None else x.index_select(0, self.rows)

    def put(self, out: torch.Tensor, picked: torch.Tensor) -> None:
        """Write `picked` to these rows of `out`."""
        if self.rows is None:
            out.copy_(picked)
        else:
            out.index_copy_(0, self.rows, picked.to(out.dtype))

    def add(self, out: torch.Tensor, part: torch.Tensor) -> None:
        """Add alpha times a vector's part to these rows, in float32, with one rounding.

        Args:
            out: [rows, d], changed in place.
            part: [n, d], of `out`'s dtype; for the one vector of this turn.
        """
        if self.rows is not None:
            self.put(out, self._sum(out.index_select(0, self.rows), part))
        elif self.uniform is not None:
            # With a number as `value`, PyTorch multiplies in float32 and rounds once.
            out.addcmul_(part, _one(out), value=self.uniform[0])
        else:
            out.copy_(self._sum(out, part))

    def _sum(self, picked: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        if self.uniform is not None:
            return torch.addcmul(picked, part, _one(picked), value=self.uniform[0])
        scaled = part.float() * self.alphas
        return scaled.add_(picked).to(picked.dtype)


def _one(like: torch.Tensor) -> torch.Tensor:
    return torch.ones((), dtype=like.dtype, device=like.device)


class Turns:
    """The alphas of all rows of one step.

    Args:
        alphas: float32 [rows, vectors].
        device: Where the engine computes.
    """

    def __init__(self, alphas: np.ndarray, device: torch.device) -> None:
        self.length: int | None = len(alphas)
        """How many rows there are; None for any number, all with the same alphas."""
        self.any: Turn | None = _turn(alphas, range(alphas.shape[1]), device)
        """Rows at which any vector has an alpha other than 0; None where there are none."""
        single = alphas.shape[1] == 1
        self.of_vector: tuple[Turn | None, ...] = (
            (self.any,)
            if single
            else tuple(_turn(alphas, [k], device) for k in range(alphas.shape[1]))
        )
        """The same for each vector by itself."""

    @classmethod
    def all_at(cls, alphas: Sequence[float], device: torch.device) -> Turns:
        """Give any number of rows the same alphas."""
        turns = cls(np.asarray([alphas], dtype=np.float32), device)
        turns.length = None
        return turns

    @classmethod
    def fixed(cls, alphas: torch.Tensor) -> Turns:
        """Let every row have an alpha, 0 or not: what is done does not depend on the numbers.

        Args:
            alphas: float32 [rows, vectors], on the device; read when the work is done.
        """
        turns = cls.__new__(cls)
        turns.length = len(alphas)
        turns.any = Turn(None, alphas, None)
        turns.of_vector = tuple(
            Turn(None, alphas[:, k : k + 1], None) for k in range(alphas.shape[1])
        )
        return turns


def _turn(alphas: np.ndarray, vectors: Sequence[int], device: torch.device) -> Turn | None:
    chosen = alphas[:, list(vectors)]
    (rows,) = np.nonzero(chosen.any(axis=1))
    if not len(rows):
        return None
    picked = chosen[rows]
    same = bool((picked == picked[0]).all())
    values = picked[:1] if same else picked
    return Turn(
        rows=None if len(rows) == len(alphas) else torch.from_numpy(rows).to(device),
        alphas=torch.from_numpy(np.ascontiguousarray(values)).to(device),
        uniform=tuple(map(float, picked[0])) if same else None,
    )
