"""Count how well base + 1 * v gives back the tuned donor."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from vllm_rvec.vector.manifest import Roundtrip
from vllm_rvec.vector.scratch import Scratch

__all__ = ["RoundtripCount"]

Integers = npt.NDArray[np.signedinteger]


@dataclass(slots=True)
class RoundtripCount:
    """Weights by their distance from the tuned donor's, in units of its dtype."""

    exact: int = 0
    one_unit_off: int = 0
    further_off: int = 0
    scratch: Scratch = field(default_factory=Scratch, repr=False)
    """For what is computed of a block."""

    def add(self, tuned: torch.Tensor, base: torch.Tensor, v: torch.Tensor) -> None:
        """Take one block into account.

        Args:
            tuned: The tuned donor's weights, in its own dtype.
            base: The base donor's, in float32.
            v: What a reader of the vector gets, in float32.
        """
        # The reference formula at alpha 1: the product is v itself, and the sum is rounded once.
        wide = torch.add(base, v, out=self.scratch.take("sum", v.shape, torch.float32))
        back = self.scratch.copy("back", wide, tuned.dtype)
        bits = torch.int32 if tuned.dtype == torch.float32 else torch.int16
        found, expected = (t.contiguous().view(bits).numpy().reshape(-1) for t in (back, tuned))
        wrong = np.not_equal(found, expected, out=self._mask(found.size))
        count = int(np.count_nonzero(wrong))
        self.exact += found.size - count
        if count:
            self._add_wrong(found[wrong], expected[wrong])

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

    def _add_wrong(self, found: Integers, expected: Integers) -> None:
        """Count distances between floats that are not the same, given their bits."""
        units = np.abs(_ordered(found) - _ordered(expected))
        near = int(np.count_nonzero(units <= 1))
        self.one_unit_off += near
        self.further_off += units.size - near

    def _mask(self, size: int) -> npt.NDArray[np.bool_]:
        mask: npt.NDArray[np.bool_] = self.scratch.take("mask", (size,), torch.bool).numpy()
        return mask


def _ordered(bits: Integers) -> npt.NDArray[np.int64]:
    """Turn floats' bits into integers in the order of the numbers; both zeros are 0."""
    wide = bits.astype(np.int64)
    magnitude = wide & np.iinfo(bits.dtype).max
    return np.where(wide < 0, -magnitude, magnitude)
