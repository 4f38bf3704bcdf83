"""The modules of examples/reasoning_in_miniature, which is a script's folder and not a package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["MINIATURE", "miniature_module"]

MINIATURE = Path(__file__).resolve().parents[2] / "examples" / "reasoning_in_miniature"


def miniature_module(name: str) -> ModuleType:
    """Import one of them as the scripts do, by its bare name."""
    sys.path.insert(0, str(MINIATURE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(MINIATURE))
