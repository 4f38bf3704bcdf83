"""Which elements of a whole tensor a view of it has: read off its strides.

Whatever views a weight loader takes of theta, the elements of v that belong to them are found here,
so that nothing has to be done to v itself, which may be stored in a form that has no views.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Window", "in_order", "span_of"]


@dataclass(frozen=True, slots=True)
class Window:
    """Rows of neighbouring elements, equally far apart: in the whole tensor, and in the output."""

    start: int
    """The first element's number in the whole tensor."""
    rows: int
    columns: int
    """Elements of a row, next to each other on both sides."""
    stride: int
    """From one row to the next in the whole tensor."""
    out_stride: int
    """From one row to the next in the output."""

    @property
    def span(self) -> int:
        """Elements of the whole tensor from the window's first to its last."""
        return (self.rows - 1) * self.stride + self.columns

    @property
    def out_span(self) -> int:
        """Elements of the output from the window's first to its last."""
        return (self.rows - 1) * self.out_stride + self.columns

    @property
    def is_stretch(self) -> bool:
        """Whether it is a single row."""
        return self.rows == 1

    @classmethod
    def of(cls, view: torch.Tensor, out: torch.Tensor, origin: int) -> Window | None:
        """Describe a view and the tensor that it is copied to.

        Args:
            view: Of a contiguous tensor, in the order of `in_order`.
            out: Of the same shape.
            origin: The storage offset of the contiguous tensor.

        Returns:
            None where they are no such window.
        """
        start = int(view.storage_offset()) - origin
        if view.is_contiguous() and out.is_contiguous():  # nearly all are
            return cls(start, 1, view.numel(), 0, 0)
        axes = _merged(view, out)
        if not axes:
            return cls(start, 1, view.numel(), 0, 0)
        *outer, (columns, step, out_step) = axes
        if step != 1 or out_step != 1 or len(outer) > 1:
            return None
        if not outer:
            return cls(start, 1, columns, 0, 0)
        ((rows, stride, out_stride),) = outer
        return cls(start, rows, columns, stride, out_stride)


def in_order(view: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Permute the axes of both so that the view's strides fall: memory's own order."""
    if view.is_contiguous():
        return view, out
    strides = view.stride()
    axes = sorted(range(view.dim()), key=lambda axis: -strides[axis])
    if axes == list(range(view.dim())):
        return view, out
    return view.permute(axes), out.permute(axes)


def span_of(view: torch.Tensor, origin: int) -> tuple[int, int]:
    """Return the first and one past the last element that a view has, in the whole tensor."""
    start = int(view.storage_offset()) - origin
    if view.is_contiguous():
        return start, start + view.numel()
    steps = zip(view.shape, view.stride(), strict=True)
    return start, start + sum((size - 1) * stride for size, stride in steps) + 1


def _merged(view: torch.Tensor, out: torch.Tensor) -> list[tuple[int, int, int]]:
    """Return sizes and both strides of the axes, with those taken together that can be."""
    axes: list[tuple[int, int, int]] = []
    for size, stride, out_stride in zip(view.shape, view.stride(), out.stride(), strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1:] == (stride * size, out_stride * size):
            axes[-1] = (axes[-1][0] * size, stride, out_stride)
        else:
            axes.append((size, stride, out_stride))
    return axes
