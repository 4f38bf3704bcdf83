"""A tensor that is theta + alpha * v, computed only when it is copied into a parameter.

vLLM's weight loaders take views of a checkpoint's tensor (slices for tensor parallelism, halves of
packed matrices) and copy them into parameters. This tensor stands for the sum: a view of it is the
same view of theta, whose strides say which elements of v belong to it, and the sum is computed
straight into the parameter at the copy. So each rank reads, adds and writes its own part only, and
once.

An operation that is not known to commute with the sum gets the computed tensor instead: slower,
never wrong. It has no storage of its own, so code that reaches past PyTorch's dispatcher can't read
theta alone: it fails.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from vllm_rvec.vector.stored import fuse_view

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm_rvec.loader.placement import Placer
    from vllm_rvec.vector.stored import Team, Term

__all__ = ["FuseLedger", "FusedTensor", "Fusion"]

aten = torch.ops.aten
COPY: Final = aten.copy_.default
ZERO: Final = aten.zero_.default
NO_STORAGE: Final = "a FusedTensor has no storage; copy it into a tensor first"

VIEW_OPERATIONS: Final = frozenset(
    {
        aten.alias.default,
        aten.detach.default,
        aten.expand.default,
        aten.permute.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.t.default,
        aten.transpose.int,
        aten.unbind.int,
        aten.unsqueeze.default,
        aten.view.default,
    }
)
"""Operations that pick or reorder elements: they commute with an elementwise sum."""


@dataclass(slots=True)
class FuseLedger:
    """What has been fused, and how, over one load."""

    copies: int = 0
    """Sums computed straight into a parameter."""
    elements: int = 0
    """Elements of those sums: what this rank read from each side, and wrote."""
    materialized: Counter[str] = field(default_factory=Counter)
    """Sums that had to be computed before the copy, by the operation that asked."""


@dataclass(frozen=True, slots=True)
class Fusion:
    """How to compute one tensor's sum."""

    terms: tuple[Term, ...]
    """What is added, in this order: tensors as they are stored, of as many elements as theta."""
    origin: int
    """The storage offset of theta as a whole, which is contiguous."""
    dtype: torch.dtype
    """What the sum is rounded to where an operation asks for it before the copy. A copy rounds
    once, to the parameter's own dtype, whatever this says."""
    ledger: FuseLedger
    """Where to count."""
    team: Team
    """Threads to share the work."""
    placer: Placer
    """What brings it into parameters that are not on the CPU."""


class FusedTensor(torch.Tensor):
    """theta + the sum of alpha * v, not computed yet.

    Args:
        theta: The target's tensor, contiguous, or a view of it; on the CPU, or on a device that
            sums may be computed on.
        fusion: How to compute the sum.
    """

    _theta: torch.Tensor
    _fusion: Fusion
    _is_shared: bool
    """Whether a view of it was taken, or it is one: then a write would have to reach the other."""

    # All work is done below, per ATen operation; without this each call would run Python twice.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # noqa: SLF001 - PyTorch's idiom

    @staticmethod
    def __new__(  # noqa: D102 - the class docstring says it
        cls: type[FusedTensor], theta: torch.Tensor, fusion: Fusion
    ) -> FusedTensor:
        self: FusedTensor = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 - as above
            cls, theta.shape, theta.stride(), dtype=fusion.dtype, device=theta.device
        )
        self._theta, self._fusion, self._is_shared = theta, fusion, False
        return self

    def __repr__(  # type: ignore[override]  # torch's stub is of another form
        self, *, tensor_contents: Any = None
    ) -> str:
        alphas = [alpha for _, alpha in self._fusion.terms]
        return f"FusedTensor({tuple(self.shape)}, {self.dtype}, alphas={alphas})"

    def data_ptr(self) -> int:
        """Refuse: PyTorch would answer 0, and whoever asks would read from there."""
        raise RuntimeError(NO_STORAGE)

    def __dlpack__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError(NO_STORAGE)

    def share_memory_(self) -> FusedTensor:
        """Refuse, as `data_ptr`."""
        raise RuntimeError(NO_STORAGE)

    def narrow(self, dim: int, start: Any, length: Any) -> FusedTensor:
        """Take a slice, past the dispatcher: weight loaders do it for every tensor."""
        return self._shared(self._theta.narrow(dim, start, length))

    def copy_into(self, out: torch.Tensor) -> torch.Tensor:
        """Compute the sum into `out`, which has this shape, rounding once to its dtype."""
        if out.is_meta:
            return out  # vLLM's reload first counts what each loader would copy
        self._fusion.ledger.copies += 1
        self._fusion.ledger.elements += out.numel()
        return self._sum(out)

    def materialize(self, operation: str) -> torch.Tensor:
        """Compute the sum as a plain tensor, for an operation that needs it."""
        self._fusion.ledger.materialized[operation] += 1
        return self._sum(torch.empty(self.shape, dtype=self.dtype, device=self.device))

    def _sum(self, out: torch.Tensor) -> torch.Tensor:
        theta, fusion = self._theta, self._fusion
        for stored, _ in fusion.terms:
            stored.check()  # a copy may come long after the stream has gone by
        here, there = theta.device, out.device
        if here.type == there.type == "cpu":
            return fuse_view(theta, fusion.origin, fusion.terms, out, fusion.team)
        if here.type == "cpu" or here == there:
            return fusion.placer.on(there).place(theta, fusion.origin, fusion.terms, out)
        # Weights that were streamed to a device, for a parameter that is elsewhere.
        return out.copy_(self._sum(torch.empty(self.shape, dtype=out.dtype, device=here)))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub forgets the class
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one ATen operation on tensors of which at least one is a FusedTensor."""
        kwargs = kwargs or {}
        if func is COPY and _is_fusing_copy(*args[:2]):
            return args[1].copy_into(args[0])
        if func in VIEW_OPERATIONS:
            return args[0]._view(func, args[1:], kwargs)  # noqa: SLF001
        if func is ZERO and not args[0]._is_shared:  # noqa: SLF001
            return args[0]._become_zeros()  # noqa: SLF001
        _refuse_writes(func, args, kwargs)
        name = str(func)
        args, kwargs = tree_map_only(cls, lambda t: t.materialize(name), (args, kwargs))
        return func(*args, **kwargs)

    def _view(self, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        theta = func(self._theta, *rest, **kwargs)
        if isinstance(theta, torch.Tensor):
            return self._shared(theta)
        return [self._shared(part) for part in theta]

    def _shared(self, theta: torch.Tensor) -> FusedTensor:
        view = FusedTensor(theta, self._fusion)
        self._is_shared = view._is_shared = True
        return view

    def _become_zeros(self) -> FusedTensor:
        """Forget the sum: ranks but the first do it with a bias that is to be added once."""
        self._theta = torch.zeros_like(self._theta)
        self._fusion = replace(self._fusion, terms=(), origin=0)
        return self


def _is_fusing_copy(out: torch.Tensor, source: torch.Tensor) -> bool:
    return (
        isinstance(source, FusedTensor)
        and not isinstance(out, FusedTensor)
        and out.shape == source.shape
    )


def _refuse_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse to write into a FusedTensor: the write would be lost with the computed copy."""
    if not func._schema.is_mutable:  # noqa: SLF001 - the only place where torch says so
        return
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))  # noqa: SLF001
    for argument in func._schema.arguments:  # noqa: SLF001
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        # A written argument may be a list, as in torch._foreach_mul_.
        written = tree_leaves((given | kwargs).get(argument.name))
        if any(isinstance(tensor, FusedTensor) for tensor in written):
            raise NotImplementedError(f"{func} writes into a checkpoint's tensor")
