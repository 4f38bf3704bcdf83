r"""Random numbers that depend on a seed and a tensor's name, and on nothing else.

Each tensor has a generator of its own: Philox 4x64-10 (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", 2011), whose 128-bit key is the first 16 bytes, little-endian, of

    blake3("rvec " + PURPOSE + " 1\0" + SEED + "\0" + NAME)

with the seed in decimal digits. So the numbers don't depend on the order of tensors, on threads or
on the machine; numpy keeps the raw stream of a bit generator fixed for all releases.
"""

from __future__ import annotations

import blake3
import numpy as np

__all__ = ["raw_numbers"]


def raw_numbers(seed: int, name: str, purpose: str) -> np.random.Philox:
    """Return the generator of one tensor.

    Args:
        seed: What the user gave.
        name: The tensor.
        purpose: What it is for: one seed gives independent numbers for each.
    """
    text = f"rvec {purpose} 1\0{seed}\0{name}"
    key = blake3.blake3(text.encode("utf-8", "surrogatepass")).digest(length=16)
    return np.random.Philox(key=int.from_bytes(key, "little"))
