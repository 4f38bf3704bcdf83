"""How a sum gets into a parameter on a GPU: added on the host or on the device, as is faster there.

On the host, the sum is computed block by block into memory from which it is sent: what crosses the
bus is the parameter. On the device, the target's weights and the vector as it is stored cross the
bus, and are decoded and added there: more bytes, less work for the host. Either way the memory is
pinned or not. Which of these four is the fastest depends on the bus, the cores and the encoding, so
it is measured during the load, on the load's own tensors.

Every way gives `arithmetic`'s reference, bit for bit; only which NaN a NaN is, is the device's own
affair. On a device, product and sum are two kernels: one that does both may be compiled to a single
rounding.

Not here: what is added (`vector.stored`), and sums into parameters on the CPU, which need no way.
"""

from __future__ import annotations

import time
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import torch

from vllm_rvec.loader.staging import Staging, wait_for
from vllm_rvec.vector.stored import fuse_view
from vllm_rvec.vector.stored.window import in_order, span_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vllm_rvec.vector.stored import StoredTensor, Team, Term

    Decode = Callable[[Sequence[torch.Tensor], float], torch.Tensor]

__all__ = ["WAYS", "Choice", "FuseOn", "Placement", "Placer", "Way", "ways_to"]

FuseOn = Literal["auto", "host", "device"]

CHUNK_ELEMENTS: Final = 1 << 21
"""Elements of a step: 4 MiB of bfloat16 in a buffer, 8 MiB for each float32 tensor that a sum on
the device needs."""

MEASURED_ELEMENTS: Final = 1 << 20
"""With fewer, what is measured is how long it takes to start."""

ROUNDS: Final = 2
"""Times that each way is measured; the faster one counts, since the first one makes buffers."""


class Way(NamedTuple):
    """One way to a device."""

    where: Literal["host", "device"]
    """Where the sum is computed."""
    is_pinned: bool
    """Whether what is sent is in pinned memory."""

    def __str__(self) -> str:
        return f"{self.where}, {'pinned' if self.is_pinned else 'pageable'}"


WAYS: Final = (Way("host", True), Way("device", True), Way("host", False), Way("device", False))
"""All of them; the first that may be taken is, until something was measured."""


def ways_to(device: torch.device, fuse_on: FuseOn) -> tuple[Way, ...]:
    """Name the ways that may be taken.

    Args:
        device: Where the parameters are.
        fuse_on: What the user asks for. Left to us, nothing is computed on a device that is no GPU
            of PyTorch's `cuda`: what its compiler makes of two kernels is not known here.
    """
    if fuse_on == "auto":
        return WAYS if device.type == "cuda" else tuple(way for way in WAYS if way.where == "host")
    return tuple(way for way in WAYS if way.where == fuse_on)


class Choice:
    """Which of several ways is the fastest, found by taking each in turn.

    Args:
        ways: At least one.
    """

    def __init__(self, ways: Sequence[Way]) -> None:
        self._seconds: dict[Way, list[float]] = {way: [] for way in ways}

    @property
    def next(self) -> Way | None:
        """The way to measure now; None where all were, or there is only one."""
        if len(self._seconds) == 1:
            return None
        way = min(self._seconds, key=lambda way: len(self._seconds[way]))
        return way if len(self._seconds[way]) < ROUNDS else None

    @property
    def best(self) -> Way:
        """The fastest of those that were measured; the first where none was."""
        return min(self._seconds, key=lambda way: min(self._seconds[way], default=float("inf")))

    def note(self, way: Way, seconds: float) -> None:
        """Remember how long an element took."""
        self._seconds[way].append(seconds)


class Placement:
    """Brings sums into parameters on one device.

    Extra memory: on the device a few steps of `CHUNK_ELEMENTS`, on the host the buffers of two
    `Staging`s. Both are made when they are first needed.

    Args:
        device: Where the parameters are.
        team: Threads of the host.
        ways: Which may be taken; they are measured where there are several.
        clock: Gives seconds.
    """

    def __init__(
        self,
        device: torch.device,
        team: Team,
        ways: Sequence[Way],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device = device
        self._team = team
        self._ways = tuple(ways)
        self._clock = clock
        self._stagings = {
            is_pinned: Staging(device, is_pinned=is_pinned) for is_pinned in (True, False)
        }
        self._choices: dict[str, Choice] = {}

    @property
    def sent_bytes(self) -> int:
        """What has crossed the bus to the device."""
        return sum(staging.sent_bytes for staging in self._stagings.values())

    @property
    def chosen(self) -> dict[str, Way]:
        """The way taken for each kind of tensor that there was."""
        return {kind: choice.best for kind, choice in self._choices.items()}

    def place(
        self, view: torch.Tensor, origin: int, terms: Sequence[Term], out: torch.Tensor
    ) -> torch.Tensor:
        """Write a view of theta, plus the same elements of every term times its alpha, into `out`.

        What is read of the files is read when this returns; what is written is there for all that
        is enqueued on the device's current stream after it.

        Args:
            view: Of a contiguous tensor that has as many elements as each term; on the CPU, or on
                the device where a way computes there.
            origin: The storage offset of that tensor.
            terms: In the order of adding.
            out: On the device, of the view's shape, of any strides; not overlapping.

        Returns:
            `out`.

        Raises:
            VectorCorruptError: A term's parts contradict each other.
        """
        if view.numel() == 0:
            return out
        theta, sink = in_order(view, out.detach())
        choice = self._choice(theta, sink, terms)
        way = choice.next if theta.numel() >= MEASURED_ELEMENTS else None
        if way is None:
            self._add(choice.best, theta, origin, terms, sink)
            return out
        started = self._now()
        self._add(way, theta, origin, terms, sink)
        choice.note(way, (self._now() - started) / theta.numel())
        return out

    def _choice(self, theta: torch.Tensor, sink: torch.Tensor, terms: Sequence[Term]) -> Choice:
        """Find what is known of tensors like this one."""
        kind = " + ".join(stored.kind for stored, _ in terms) or "nothing"
        if not (theta.is_contiguous() and sink.is_contiguous()):
            kind += " in slices"
        ways = self._ways
        if theta.device.type != "cpu":
            kind += " onto weights that are there"
            ways = tuple(way for way in ways if way.where == "device")
        return self._choices.setdefault(kind, Choice(ways))

    def _now(self) -> float:
        wait_for(self.device)
        return self._clock()

    def _add(
        self, way: Way, theta: torch.Tensor, origin: int, terms: Sequence[Term], out: torch.Tensor
    ) -> None:
        staging = self._stagings[way.is_pinned]
        for block, sink in _blocks(theta, out):
            if way.where == "host":
                staging.fill(sink, partial(fuse_view, block, origin, terms, team=self._team))
            else:
                _add_there(staging, block, origin, terms, sink)


class Placer:
    """The placements of one load, each made when a first parameter is found on its device.

    Args:
        team: Threads of the host.
        fuse_on: Where to add.
    """

    def __init__(self, team: Team, fuse_on: FuseOn = "auto") -> None:
        self._team = team
        self._fuse_on = fuse_on
        self._placements: dict[torch.device, Placement] = {}
        self._chosen: dict[str, set[Way]] = defaultdict(set)

    def adds_on(self, device: torch.device) -> bool:
        """Tell whether a sum may be computed where a device has the weights already."""
        return any(way.where == "device" for way in ways_to(device, self._fuse_on))

    def on(self, device: torch.device) -> Placement:
        """Return the placement of a device that is not the CPU."""
        if device not in self._placements:
            ways = ways_to(device, self._fuse_on)
            self._placements[device] = Placement(device, self._team, ways)
        return self._placements[device]

    def finish(self) -> None:
        """Wait for all copies, and let the buffers go. A later sum makes new ones."""
        for device, placement in self._placements.items():
            wait_for(device)
            for kind, way in placement.chosen.items():
                self._chosen[kind].add(way)
        self._placements.clear()

    def summary(self) -> str:
        """Say for the log which ways were taken; empty where all parameters were on the CPU."""
        return "; ".join(
            f"{kind}: {' or '.join(map(str, sorted(ways)))}" for kind, ways in self._chosen.items()
        )


def _blocks(theta: torch.Tensor, out: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut along the first axis, then the next, until a block spans no more than a step."""
    if theta.dim() == 0:
        yield theta.reshape(1), out.reshape(1)
        return
    row = max(theta.stride(0), theta.numel() // theta.shape[0], 1)
    if rows := CHUNK_ELEMENTS // row:
        yield from zip(torch.split(theta, rows), torch.split(out, rows), strict=True)
        return
    for number in range(theta.shape[0]):
        yield from _blocks(theta[number], out[number])


def _add_there(
    staging: Staging, block: torch.Tensor, origin: int, terms: Sequence[Term], out: torch.Tensor
) -> None:
    """Send what makes up a block to the device, and add it there."""
    own = (block,) if block.device.type == "cpu" else ()
    parts = [_part(stored, block, origin) for stored, _ in terms]
    sent = iter(staging.send([*own, *(tensor for tensors, _ in parts for tensor in tensors)]))
    weights = next(sent) if own else block
    total = None
    for (tensors, decode), (_, alpha) in zip(parts, terms, strict=True):
        product = decode([next(sent) for _ in tensors], alpha)
        if total is not None:
            total.add_(product)
        elif product.is_contiguous():
            total = product.add_(weights)
        else:
            total = product + weights
    out.copy_(weights if total is None else total)


def _part(
    stored: StoredTensor, block: torch.Tensor, origin: int
) -> tuple[tuple[torch.Tensor, ...], Decode]:
    """Return what is to be sent of a term, and what makes alpha * v of it, in the block's shape."""
    start, stop = span_of(block, origin)
    shape, strides = tuple(block.shape), block.stride()
    if stored.is_view:  # then its slices are as cheap as theta's
        own = stored.read(start, stop).as_strided(shape, strides)
        return (own,), lambda sent, alpha: sent[0].float().mul_(alpha)
    tensors, decode = stored.compact(start, stop)

    def multiply(sent: Sequence[torch.Tensor], alpha: float) -> torch.Tensor:
        return decode(sent).float().mul_(alpha).as_strided(shape, strides)

    return tensors, multiply
