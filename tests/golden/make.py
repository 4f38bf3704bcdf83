"""Write the golden files anew: `python -m tests.golden.make`. Only for a new format version."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.support.tiny_vectors import EXAMPLES, example, write_vector

__all__ = ["FOLDER"]

FOLDER = Path(__file__).parent / "version-1"


if __name__ == "__main__":
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name in EXAMPLES:
        write_vector(FOLDER / name, {"model.layers.0.weight": example(name)})
