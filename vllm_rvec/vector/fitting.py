"""The tensor of a vector that is added to one of a target's: the same for loader and merge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_rvec.vector.stored import PaddedTensor

if TYPE_CHECKING:
    from vllm_rvec.vector.compatibility.structure import Pairing
    from vllm_rvec.vector.reader import VectorReader
    from vllm_rvec.vector.stored import StoredTensor

__all__ = ["fitted_part"]


def fitted_part(
    vector: VectorReader, pairing: Pairing, name: str, shape: tuple[int, ...], alpha: float
) -> StoredTensor | None:
    """Return what is added, times alpha, to a target's tensor, in the target's shape.

    Args:
        vector: The stored vector.
        pairing: Its manifest with the vocabulary policy.
        name: The target's tensor.
        shape: The target's shape.
        alpha: The scaling coefficient. Rows that the vector lacks get zeros of a sign that makes
            their product -0.0, so that adding it leaves every bit of those rows as it is.

    Returns:
        None where nothing is added: the part is zero, there is none, it does not fit, or the
        policy skips it. Whether that is allowed is the structure check's business.
    """
    part = pairing.part_for(name)
    if part is None or pairing.is_skipped(name) or not pairing.fits(name, shape):
        return None
    stored = vector.stored(part)
    if stored is None or stored.shape == shape:
        return stored
    return PaddedTensor(stored, shape, -0.0 if alpha > 0 else 0.0)
