"""Count how well base + 1 * v gives back the tuned donor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vllm_rvec.vector.manifest import Roundtrip

__all__ = ["RoundtripCount"]

Integers = npt.NDArray[np.signedinteger]


@dataclass(slots=True)
class RoundtripCount:
    """Weights by their distance from the tuned donor's, in units of its dtype."""

    exact: int = 0
    one_unit_off: int = 0
    further_off: int = 0

    def add(self, tuned: torch.Tensor, base: torch.Tensor, v: torch.Tensor) -> None:
        """Take one block into account.

        Args:
            tuned: The tuned donor's weights, in its own dtype.
            base: The base donor's, in float32.
            v: What a reader of the vector gets, in float32.
        """
        # The reference formula at alpha 1: the product is v itself, and the sum is rounded once.
        back = torch.add(base, v).to(tuned.dtype)
        bits = torch.int32 if tuned.dtype == torch.float32 else torch.int16
        found, expected = (t.contiguous().view(bits).numpy().reshape(-1) for t in (back, tuned))
        exact = int(np.count_nonzero(np.equal(found, expected)))
        self.exact += exact
        if exact != found.size:
            self._add_wrong(found, expected, exact)

    def merge(self, other: RoundtripCount) -> None:
        """Add another count."""
        self.exact += other.exact
        self.one_unit_off += other.one_unit_off
        self.further_off += other.further_off

    def total(self) -> Roundtrip:
        """Return what the manifest says."""
        weights = self.exact + self.one_unit_off + self.further_off
        return Roundtrip(
            weights=weights,
            exact=self.exact,
            one_unit_off=self.one_unit_off,
            further_off=self.further_off,
        )

    def _add_wrong(self, found: Integers, expected: Integers, exact: int) -> None:
        """Count distances between floats that are not all the same, given their bits."""
        other_sign = (found ^ expected) < 0
        # Of one sign, floats are in the order of their bits.
        near = np.abs(np.subtract(found, expected)) <= 1
        if other_sign.any():
            crossing = np.flatnonzero(other_sign)
            units = np.abs(_ordered(found[crossing]) - _ordered(expected[crossing]))
            near[crossing] = units <= 1
        near_count = int(np.count_nonzero(near))
        self.one_unit_off += near_count - exact
        self.further_off += found.size - near_count


def _ordered(bits: Integers) -> npt.NDArray[np.int64]:
    """Turn floats' bits into integers in the order of the numbers; both zeros are 0."""
    wide = bits.astype(np.int64)
    magnitude = wide & np.iinfo(bits.dtype).max
    return np.where(wide < 0, -magnitude, magnitude)
