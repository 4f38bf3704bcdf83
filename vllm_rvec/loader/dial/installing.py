"""Putting v beside each module of a model that it changes, or saying what it can't be put beside.

v comes as a second model of the same class whose parameters are v: vLLM's own weight loaders have
packed and sliced it as they do theta. Its layers go on as holders of v; the rest is let go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from vllm_rvec.errors import ConfigError
from vllm_rvec.loader.dial.held import Int8Matrix, LayerMatrix, PlainMatrix
from vllm_rvec.loader.dial.layers import (
    DialedHead,
    DialedMatrix,
    DialedMethod,
    DialedNorm,
    hook_embedding,
    hook_linear,
    hook_norm,
)
from vllm_rvec.loader.vllm_api import (
    GemmaRMSNorm,
    LayerNorm,
    LinearBase,
    MLAAttention,
    ParallelLMHead,
    RMSNorm,
    VocabParallelEmbedding,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm_rvec.loader.dial.held import HeldMatrix
    from vllm_rvec.loader.dial.layers import Batch
    from vllm_rvec.vector.dial import VectorDtype

__all__ = ["Installed", "install"]

WAY_OUT = (
    "use --mode fused (without vllm-rvec serve: leave the key `mode` out): one engine per alpha"
)
GLANCE = 4096
"""Elements that tell most tensors from zeros."""

NORMS = (RMSNorm, GemmaRMSNorm, LayerNorm, nn.LayerNorm)
VLLM_MATRICES = (LinearBase, VocabParallelEmbedding)
TORCH_MATRICES = (nn.Linear, nn.Embedding)
APPLICABLE = {"weight", "bias"}


@dataclass(frozen=True, slots=True)
class Installed:
    """What v was put beside."""

    modules: tuple[str, ...]
    """Their names."""
    held_bytes: int
    """What v takes in the engine's memory on this rank."""
    relative_errors: dict[str, float]
    """What int8 lost of each matrix, as a Frobenius norm over that of v; empty for auto."""

    @property
    def worst(self) -> str:
        """The largest loss, in words; empty where nothing was lost."""
        if not self.relative_errors:
            return ""
        name = max(self.relative_errors, key=self.relative_errors.__getitem__)
        return f"at most {self.relative_errors[name]:.2%} ({name})"


class _Part(NamedTuple):
    """What one vector has for a module."""

    layer: Any
    """The same module of its shadow."""
    changed: set[str]
    """Names of its parameters that are not zero."""

    def vector(self, key: str) -> torch.Tensor | None:
        """One of these; None where it is zero."""
        if key not in self.changed:
            return None
        found: torch.Tensor = getattr(self.layer, key)
        return found.detach()


def install(
    model: nn.Module, shadows: Sequence[nn.Module], batch: Batch, dtype: VectorDtype
) -> Installed:
    """Have a model add alpha v in every module that v changes.

    Args:
        model: Loaded with theta, and ready to run.
        shadows: One for each vector: the same class, its parameters v, as loaded.
        batch: What the modules will look at.
        dtype: How to hold matrices.

    Returns:
        What was done.

    Raises:
        ConfigError: v changes parameters that can't be applied; all of them are named.
    """
    changed = [_changed(shadow) for shadow in shadows]
    modules = dict(model.named_modules())
    names = [name for name in modules if any(name in one for one in changed)]
    problems = [p for name in names for p in _problems(name, modules[name], shadows, changed)]
    absorbed = {id(m.kv_b_proj) for m in modules.values() if isinstance(m, MLAAttention)}
    problems += [
        f"{name}: latent attention makes other matrices of it, which have no alpha"
        for name in names
        if id(modules[name]) in absorbed
    ]
    # Shared modules have several names, of which vLLM's walk gives the first.
    problems += [
        f"{name}: not found in the model" for one in changed for name in one if name not in modules
    ]
    if problems:
        raise ConfigError(
            f"{len(problems)} parameters that the vector changes can't be applied for each request",
            problems=sorted(problems),
            why="a dial adds alpha (v x) to linear layers, embeddings, norms and the output head",
            fix=WAY_OUT,
        )
    errors: dict[str, float] = {}
    held = 0
    for name in names:
        parts = [
            _Part(shadow.get_submodule(name), one.get(name, set()))
            for shadow, one in zip(shadows, changed, strict=True)
        ]
        held += _install_one((name, modules[name]), parts, batch, dtype, errors)
    return Installed(tuple(names), held, errors)


def _changed(shadow: nn.Module) -> dict[str, set[str]]:
    """Names of parameters that are not zero, by module."""
    found: dict[str, set[str]] = {}
    for name, module in shadow.named_modules():
        own = {key for key, value in module.named_parameters(recurse=False) if not is_zero(value)}
        if own:
            found[name] = own
    return found


def is_zero(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has nothing but zeros; for one that has not, its start mostly does."""
    flat = tensor.detach().view(-1)
    if bool(torch.any(flat[:GLANCE])):
        return False
    return not int(torch.count_nonzero(flat))  # a third of the time of `torch.any`


def _problems(
    name: str,
    module: nn.Module,
    shadows: Sequence[nn.Module],
    changed: Sequence[dict[str, set[str]]],
) -> Iterator[str]:
    for shadow, one in zip(shadows, changed, strict=True):
        for key in sorted(one.get(name, ())):
            if why := _problem(module, key, getattr(shadow.get_submodule(name), key)):
                yield f"{name}.{key}: {why}"


def _problem(module: nn.Module, key: str, vector: torch.Tensor) -> str:
    kind = type(module).__name__
    is_known = isinstance(module, NORMS + VLLM_MATRICES + TORCH_MATRICES) and key in APPLICABLE
    # A convolution of a state-space layer is a linear layer to vLLM, with a weight of its own form.
    if not is_known or vector.dim() > 2:
        return f"of {kind}, which can't take an alpha for each token"
    if key == "bias" and getattr(module, "skip_bias_add", False):
        return f"{kind} hands its bias on to be added elsewhere"
    return ""


def _install_one(
    named: tuple[str, Any],
    parts: Sequence[_Part],
    batch: Batch,
    dtype: VectorDtype,
    errors: dict[str, float],
) -> int:
    """Put vectors' parts beside one module; say how many bytes they take."""
    name, module = named
    if isinstance(module, NORMS):
        dialed = DialedNorm(name, batch, module, *_norm_vectors(module, parts))
        hook_norm(module, dialed)
        return sum(v.nbytes for v in (dialed.weights, dialed.biases) if v is not None)
    matrices = [_hold(name, part, dtype, errors) for part in parts]
    biases = [None if (b := part.vector("bias")) is None else b.float() for part in parts]
    matrix = DialedMatrix(name, batch, [m for m, _ in matrices], biases)
    if isinstance(module, nn.Linear):
        hook_linear(module, matrix)
    elif isinstance(module, nn.Embedding):
        hook_embedding(module, matrix)
    else:
        method = DialedHead if isinstance(module, VocabParallelEmbedding) else DialedMethod
        module.quant_method = method(module.quant_method, matrix)
        if getattr(module, "use_fused_embedding", False):
            module.use_fused_embedding = False  # it would go past the method
    return sum(size for _, size in matrices) + sum(b.nbytes for b in biases if b is not None)


def _norm_vectors(norm: Any, parts: Sequence[_Part]) -> tuple[torch.Tensor, torch.Tensor | None]:
    biases = None if getattr(norm, "bias", None) is None else _stacked(norm.bias, "bias", parts)
    return _stacked(norm.weight, "weight", parts), biases


def _stacked(like: torch.Tensor, key: str, parts: Sequence[_Part]) -> torch.Tensor:
    """float32 [vectors, d], zeros where a vector leaves it as it is."""
    zeros = torch.zeros_like(like, dtype=torch.float32)
    found = [part.vector(key) for part in parts]
    return torch.stack([zeros if vector is None else vector.float() for vector in found])


def _hold(
    name: str, part: _Part, dtype: VectorDtype, errors: dict[str, float]
) -> tuple[HeldMatrix | None, int]:
    """Hold one vector's matrix; also say how many bytes that takes."""
    if (weight := part.vector("weight")) is None:
        return None, 0
    if dtype == "int8":
        coded = Int8Matrix(weight)
        errors[name] = max(errors.get(name, 0.0), coded.relative_error)
        return coded, coded.codes.nbytes + coded.scales.nbytes
    if isinstance(part.layer, TORCH_MATRICES):
        return PlainMatrix(weight), weight.nbytes
    is_packed = isinstance(part.layer, LinearBase | ParallelLMHead)
    return LayerMatrix(part.layer, is_packed=is_packed), weight.nbytes
