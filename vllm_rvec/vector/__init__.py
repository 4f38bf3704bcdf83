"""The stored vector: format, manifest, reading, extraction, compatibility with a target.

FORMAT.md beside this file is the specification. Importing this package imports no torch;
`extract` does, and so does reading a tensor.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_rvec.vector.manifest import Manifest, TensorEntry
    from vllm_rvec.vector.reader import VectorReader

__all__ = ["Manifest", "TensorEntry", "VectorReader"]

ROOMS = {"Manifest": "manifest", "TensorEntry": "manifest", "VectorReader": "reader"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: `stored` needs PyTorch and NumPy alone."""
    if name not in ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{ROOMS[name]}"), name)
