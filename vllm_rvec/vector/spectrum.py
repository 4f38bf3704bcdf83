"""The largest singular values of a vector's matrices: how much of it a low rank would keep.

Exact for small matrices and for lowrank tensors, else by the randomized method of `lowrank`. That
errs downwards, and most where no direction stands out: of a matrix of noise it finds nine tenths
of the energy of the top 64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_rvec.arithmetic import is_finite
from vllm_rvec.errors import VectorCorruptError
from vllm_rvec.vector.encodings.lowrank import top_singular
from vllm_rvec.vector.encodings.source import norm_of, row_blocks
from vllm_rvec.vector.layout import LORA_A, LORA_B
from vllm_rvec.vector.statistics import TOP, Spectrum, has_spectrum

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_rvec.vector.reader import VectorReader

__all__ = ["spectra", "spectrum_of"]


def spectra(
    vector: VectorReader, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, Spectrum]:
    """Compute the singular values of all matrices of a vector, one in memory at a time.

    Args:
        vector: The stored vector.
        on_progress: Called after each matrix with the weights done and the weights in all.

    Raises:
        VectorCorruptError: A tensor can't be read, or holds NaN or infinity.
        VectorFormatError: A tensor would take more memory than this machine has.
    """
    entries = {name: e for name, e in vector.manifest.tensors.items() if has_spectrum(e)}
    total, done = sum(entry.elements for entry in entries.values()), 0
    found = {}
    for name, entry in entries.items():
        found[name] = _of_tensor(vector, name)
        vector.release(name)
        done += entry.elements
        if on_progress is not None:
            on_progress(done, total)
    return found


def spectrum_of(tensor: torch.Tensor) -> Spectrum:
    """Compute the largest singular values of a matrix or a stack of matrices.

    Args:
        tensor: `[out, in]` or `[stack, out, in]`, any floating-point dtype, all finite.
    """
    squares, total = torch.zeros(TOP, dtype=torch.float64), 0.0
    for matrix in tensor.unbind() if tensor.dim() == 3 else (tensor,):
        peak = float(matrix.abs().max())
        if peak == 0:
            continue
        # To its largest element: squares of what a vector may hold leave float32's range.
        scaled = matrix.float() / peak
        _, values, _ = top_singular(scaled, TOP)
        squares[: values.numel()] += (values.double() * peak).square()
        total += sum((norm_of(block) * peak) ** 2 for block in row_blocks(scaled))
    return Spectrum(tuple(squares[: min(TOP, *tensor.shape[-2:])].tolist()), total)


def _of_tensor(vector: VectorReader, name: str) -> Spectrum:
    try:
        if vector.manifest.tensors[name].encoding == "lowrank":
            return _of_factors(vector, name)
        tensor = vector.tensor(name)
        if tensor is not None and is_finite(tensor):
            return spectrum_of(tensor)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        pass  # what NaN or infinity does to a decomposition
    raise VectorCorruptError(
        f"tensor {name!r} of {vector.folder} has no singular values",
        why="it holds NaN or infinity, or numbers next to that",
        fix="`vllm-rvec verify` tells what is damaged; copy or download the whole folder again",
        path=vector.folder,
        tensor_name=name,
    )


def _of_factors(vector: VectorReader, name: str) -> Spectrum:
    """Take singular values from the factors' triangles: exact, and nothing large is made."""
    lora_a, lora_b = vector.part(name + LORA_A).double(), vector.part(name + LORA_B).double()
    if not (is_finite(lora_a) and is_finite(lora_b)):
        raise torch.linalg.LinAlgError  # type: ignore[attr-defined]
    core = torch.linalg.qr(lora_b).R @ torch.linalg.qr(lora_a.T).R.T
    scaling = vector.manifest.tensors[name].scaling or 0.0
    squares = (torch.linalg.svdvals(core) * scaling).square()
    return Spectrum(tuple(squares[:TOP].tolist()), float(squares.sum()))
