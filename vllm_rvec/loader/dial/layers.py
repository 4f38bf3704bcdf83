"""The modules of a model that answers any alpha: theta's own work, and v's part added to it.

Linear layers, embeddings and output heads keep their module; its `quant_method` is wrapped, so that
v's part comes before the ranks of a tensor parallel layout add theirs up. Norms keep theirs too and
get a forward hook. What is added is one operation for torch.compile (`vllm_rvec::turn`), which
looks at nothing inside: its work depends on which tokens have an alpha.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vllm_rvec.loader.dial.turns import Turns
from vllm_rvec.loader.vllm_api import GemmaRMSNorm, QuantizeMethodBase, RMSNorm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from vllm_rvec.loader.dial.held import HeldMatrix
    from vllm_rvec.loader.dial.turns import Turn

__all__ = [
    "Batch",
    "DialedMatrix",
    "DialedMethod",
    "DialedNorm",
    "hook_embedding",
    "hook_linear",
    "hook_norm",
]

LINEAR, LINEAR_BIAS = "linear", "linear+bias"
HEAD, HEAD_BIAS = "head", "head+bias"
EMBEDDING, NORM = "embedding", "norm"
HEADS = (HEAD, HEAD_BIAS)
WITH_BIAS = (LINEAR_BIAS, HEAD_BIAS)


@dataclass(slots=True)
class Batch:
    """What all modules of a model look at: the alphas of this step. One for each model."""

    tokens: Turns
    """Of each token, in the order in which they go through the model."""
    samples: Turns
    """Of each row that goes through the output head."""
    vectors: int
    """How many there are."""
    names: tuple[str, ...] = ()
    """Of all modules that have a part of v."""
    has_batch_axis: bool = False
    """Whether a 1 stands before the tokens, as in vLLM's Transformers backend."""
    static_alphas: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """float32 [most tokens, vectors] on the device: what CUDA graphs read, which always compute v's
    part of every row, with 0 where there is none. Empty where there are no such graphs."""
    called: dict[str, set[int]] | None = None
    """While the model is rehearsed: modules that took part, and with how many rows."""


@dataclass(frozen=True, slots=True)
class Step:
    """One module's work in a step of which some rows have an alpha."""

    out: torch.Tensor
    """[rows, ...], changed in place."""
    x: torch.Tensor
    """What went in, [rows, ...]."""
    some: Turn
    """Rows at which any vector has an alpha."""
    each: tuple[Turn | None, ...]
    """The same for each vector."""
    kind: str
    """As for `Dialed.turn`."""


class Dialed:
    """v's part of one module.

    Args:
        name: The module's.
        batch: The model's.
    """

    def __init__(self, name: str, batch: Batch) -> None:
        self.name, self.batch = name, batch
        # The same in every process that has this model, as compiled graphs are kept with it; a
        # second model in one process gets another.
        numbered = (f"{name}#{number}" for number in range(2, 1000))
        self.key = next(key for key in (name, *numbered) if key not in _DIALED)
        _DIALED[self.key] = self

    def turn(self, out: torch.Tensor, x: torch.Tensor, kind: str) -> None:
        """Add v's part to `out`, in place.

        Args:
            out: [rows, d], what theta gave.
            x: What went into the module: [rows, in], or ids [rows].
            kind: One of the words at the top of this module.
        """
        if torch.compiler.is_compiling():
            torch.ops.vllm_rvec.turn(out, x, self.key, kind)
        else:
            self.apply(out, x, kind)

    def apply(self, out: torch.Tensor, x: torch.Tensor, kind: str) -> None:
        """Do it, past the compiler."""
        if self.batch.has_batch_axis:
            out, x = _without_batch_axis(out, 3), _without_batch_axis(x, 2 + (kind != EMBEDDING))
        rows = x.shape[0]
        if self.batch.called is not None:
            self.batch.called.setdefault(self.name, set()).add(rows)
        turns = self.batch.samples if kind in HEADS else self.batch.tokens
        if _is_captured(out):
            turns = Turns.fixed(self.batch.static_alphas[:rows])
        if turns.any is None:
            return
        if turns.length is not None and rows < turns.length:
            msg = (
                f"{self.name} was given {rows} rows in a step of {turns.length} tokens: "
                "this model can't be served by a dial; use --mode fused"
            )
            raise RuntimeError(msg)
        # A batch that was padded has rows without a request at its end.
        length = rows if turns.length is None else turns.length
        self.add(Step(out[:length], x[:length], turns.any, turns.of_vector, kind))

    def add(self, step: Step) -> None:
        """Add v's part."""
        raise NotImplementedError


_DIALED: weakref.WeakValueDictionary[str, Dialed] = weakref.WeakValueDictionary()
"""By key: an operation of PyTorch's takes tensors and text, and has to find its module again."""


@torch.library.custom_op("vllm_rvec::turn", mutates_args=("out",))
def _turn(out: torch.Tensor, x: torch.Tensor, key: str, kind: str) -> None:
    _DIALED[key].apply(out, x, kind)


@_turn.register_fake
def _(out: torch.Tensor, x: torch.Tensor, key: str, kind: str) -> None:
    pass


def _without_batch_axis(x: torch.Tensor, least: int) -> torch.Tensor:
    """[1, tokens, ...] -> [tokens, ...], of what has at least so many dimensions."""
    return x.squeeze(0) if x.dim() >= least and x.shape[0] == 1 else x


def _is_captured(out: torch.Tensor) -> bool:
    return out.is_cuda and torch.cuda.is_current_stream_capturing()


class DialedMatrix(Dialed):
    """v's part of a linear layer, an embedding or an output head.

    Args:
        name: The module's.
        batch: The model's.
        matrices: Of each vector; None where it leaves this matrix as it is.
        biases: Of each vector, [out], float32; None where it has or changes none.
    """

    def __init__(
        self,
        name: str,
        batch: Batch,
        matrices: Sequence[HeldMatrix | None],
        biases: Sequence[torch.Tensor | None],
    ) -> None:
        super().__init__(name, batch)
        self.matrices, self.biases = tuple(matrices), tuple(biases)

    def add(self, step: Step) -> None:
        """Add alpha (v x + the bias of v), or rows of alpha v, to rows of `out`."""
        if step.kind == EMBEDDING:
            self._add_rows(step)
            return
        for matrix, bias, turn in zip(self.matrices, self.biases, step.each, strict=True):
            if turn is None:
                continue
            part = _part(matrix, bias if step.kind in WITH_BIAS else None, turn.pick(step.x))
            if part is not None:
                turn.add(step.out, part)

    def _add_rows(self, step: Step) -> None:
        """Add rows of v by the formula of `arithmetic`: for one vector the bits of a fused one."""
        some = step.some
        ids, total = some.pick(step.x), some.pick(step.out).float()
        for k, matrix in enumerate(self.matrices):
            if matrix is not None:
                total = total + matrix.rows(ids) * some.alphas[:, k : k + 1]
        some.put(step.out, total)


def _part(
    matrix: HeldMatrix | None, bias: torch.Tensor | None, x: torch.Tensor
) -> torch.Tensor | None:
    """The product and the bias of v: [n, in] -> [n, out]; None where v has neither."""
    if matrix is None:
        return None if bias is None else bias.to(x.dtype).expand(len(x), -1)
    part = matrix.times(x)
    return part if bias is None else part.add_(bias.to(part.dtype))


class DialedMethod(QuantizeMethodBase):  # type: ignore[misc]  # vLLM is untyped here
    """A module's `quant_method`, with v's part added to what it computes.

    Args:
        base: The module's own; theta may be quantized.
        dialed: v's part.
    """

    kinds = (LINEAR, LINEAR_BIAS)
    """Of a product without bias, and with one."""

    def __init__(self, base: Any, dialed: DialedMatrix) -> None:
        self.base, self.dialed = base, dialed
        # The class has these too, so that __getattr__ would not be asked.
        self.requires_device_loading = base.requires_device_loading
        self.uses_meta_device = base.uses_meta_device
        self.supports_pre_processed_weights = base.supports_pre_processed_weights

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """As the module's own."""
        self.base.create_weights(layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """As the module's own."""
        self.base.process_weights_after_loading(layer)

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(theta + alpha v) x, and the biases."""
        out: torch.Tensor = self.base.apply(layer, x, bias)
        self.dialed.turn(out, x, self.kinds[bias is not None])
        return out

    def embedding(self, layer: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        """Rows of theta + alpha v."""
        out: torch.Tensor = self.base.embedding(layer, ids)
        self.dialed.turn(out, ids, EMBEDDING)
        return out


class DialedHead(DialedMethod):
    """The same for what makes logits: its rows are those that are sampled."""

    kinds = (HEAD, HEAD_BIAS)


class DialedNorm(Dialed):
    """The norm of theta + alpha v, computed anew in float32 for the rows that have an alpha.

    Args:
        name: The module's.
        batch: The model's.
        norm: The module.
        weights: float32 [vectors, d], zeros where a vector leaves it as it is.
        biases: The same of the bias; None where the norm has none.
    """

    def __init__(
        self,
        name: str,
        batch: Batch,
        norm: Any,
        weights: torch.Tensor,
        biases: torch.Tensor | None,
    ) -> None:
        super().__init__(name, batch)
        self._norm = norm
        self.weights, self.biases = weights, biases
        self._is_centred = not isinstance(norm, RMSNorm | GemmaRMSNorm)
        self._offset = 1.0 if isinstance(norm, GemmaRMSNorm) else 0.0
        self._epsilon: float = norm.eps if self._is_centred else norm.variance_epsilon
        self._variance_size: int | None = getattr(norm, "variance_size_override", None)

    def add(self, step: Step) -> None:
        """Put norm(x) (w + alpha v) in the place of norm(x) w: `x` is what was normalized."""
        some = step.some
        rows = self._normalized(some.pick(step.x).float())
        theta: torch.Tensor = self._norm.weight.float() + self._offset
        result = rows * _per_row(theta, self.weights, some.alphas, rows)
        if self.biases is not None:
            bias: torch.Tensor = self._norm.bias.float()
            result = result + _per_row(bias, self.biases, some.alphas, rows)
        some.put(step.out, result)

    def _normalized(self, x: torch.Tensor) -> torch.Tensor:
        if self._is_centred:
            x = x - x.mean(dim=-1, keepdim=True)
        counted = x if self._variance_size is None else x[..., : self._variance_size]
        return x * torch.rsqrt(counted.square().mean(dim=-1, keepdim=True) + self._epsilon)


def _per_row(
    theta: torch.Tensor, vectors: torch.Tensor, alphas: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """Sum up theta + alpha v, float32 [d], for each row; of a shape that multiplies with `rows`."""
    total = theta
    for k, vector in enumerate(vectors):
        total = total + alphas[:, k : k + 1] * vector
    return total.view(len(alphas), *[1] * (rows.dim() - 2), -1)


def hook_norm(norm: nn.Module, dialed: DialedNorm) -> None:
    """Have a norm's result followed by v's part."""

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            out, x = output  # the sum with the residual is what was normalized
        else:
            out, x = output, _input(args, kwargs)
        dialed.turn(out, x, NORM)
        return output

    norm.register_forward_hook(after, with_kwargs=True)


def hook_linear(linear: nn.Module, dialed: DialedMatrix) -> None:
    """The same for PyTorch's own linear layer."""
    _hook(linear, dialed, LINEAR_BIAS)


def hook_embedding(embedding: nn.Module, dialed: DialedMatrix) -> None:
    """The same for PyTorch's own embedding, of positions for example."""
    _hook(embedding, dialed, EMBEDDING)


def _hook(module: nn.Module, dialed: DialedMatrix, kind: str) -> None:
    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        dialed.turn(output, _input(args, kwargs), kind)
        return output

    module.register_forward_hook(after, with_kwargs=True)


def _input(args: Any, kwargs: Any) -> Any:
    return args[0] if args else next(iter(kwargs.values()))
