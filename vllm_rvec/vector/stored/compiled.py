"""The compiled loops, where they can be had."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

__all__ = ["compiled_loops", "numbers"]


@cache
def compiled_loops() -> Any:
    """Return `kernels`, or None without numba. Importing it takes half a second."""
    try:
        from vllm_rvec.vector.stored import kernels  # noqa: PLC0415 - as the docstring says
    except ImportError:
        return None
    return kernels


def numbers(*values: int) -> tuple[Any, ...]:
    """Make positions that numba never takes for negative ones, which count from behind."""
    return tuple(map(np.uintp, values))
