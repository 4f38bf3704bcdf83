"""Add stored tensors to a view of a target's tensor, straight into where the sum goes.

The result is `arithmetic`'s reference, bit for bit, whatever way is taken: one compiled pass where
there is a single term with a loop for it, PyTorch's kernel where all is dense, else block by block.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from vllm_rvec.arithmetic import BLOCK_ELEMENTS, fuse_all
from vllm_rvec.vector.stored.window import in_order, span_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_rvec.vector.stored.team import Team
    from vllm_rvec.vector.stored.tensor import StoredTensor

__all__ = ["Term", "fuse_view"]

Term = tuple["StoredTensor", float]
"""What is added, and its alpha, which is not 0."""


def fuse_view(
    view: torch.Tensor, origin: int, terms: Sequence[Term], out: torch.Tensor, team: Team
) -> torch.Tensor:
    """Write a view of theta, plus the same elements of every term times its alpha, into `out`.

    Args:
        view: Of a contiguous tensor on the CPU that has as many elements as each term.
        origin: The storage offset of that tensor.
        terms: In the order of adding.
        out: On the CPU, of the view's shape, one of `arithmetic.FLOAT_DTYPES`; not overlapping.
        team: Threads to share the work.

    Returns:
        `out`.

    Raises:
        VectorCorruptError: A term's parts contradict each other.
    """
    if view.numel() == 0:
        return out
    theta, sink = in_order(view, out.detach())
    if len(terms) == 1 and terms[0][0].add(theta, sink, origin, terms[0][1], team):
        return out
    if all(stored.is_view for stored, _ in terms):
        _fuse_block(theta, origin, terms, sink)
        return out
    theta, sink = (side.reshape(1) if side.dim() == 0 else side for side in (theta, sink))
    rows = max(1, BLOCK_ELEMENTS // max(1, theta.stride(0)))
    blocks = zip(torch.split(theta, rows), torch.split(sink, rows), strict=True)
    team.run(partial(_fuse_block, block, origin, terms, part) for block, part in blocks)
    return out


def _fuse_block(theta: torch.Tensor, origin: int, terms: Sequence[Term], out: torch.Tensor) -> None:
    start, stop = span_of(theta, origin)
    shape, strides = theta.shape, theta.stride()
    added = [(stored.read(start, stop).as_strided(shape, strides), a) for stored, a in terms]
    fuse_all(theta, added, out=out)
