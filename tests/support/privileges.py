"""Tests of permissions, which root does not feel."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["without_privileges"]

NOBODY = 65534


@contextmanager
def without_privileges() -> Iterator[Path]:
    """Give a new folder, and be a user who is not root while the block runs."""
    is_root = os.geteuid() == 0
    # Not pytest's tmp_path: the folders above it are root's alone.
    with tempfile.TemporaryDirectory() as folder:
        if is_root:
            os.chown(folder, NOBODY, NOBODY)
            os.seteuid(NOBODY)
        try:
            yield Path(folder)
        finally:
            if is_root:
                os.seteuid(0)
