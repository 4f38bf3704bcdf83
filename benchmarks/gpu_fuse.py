"""Add on the host or on the device? With pinned staging or without? The fuse path alone, on a GPU.

Run by `make bench-gpu`; alone: `python -m benchmarks.gpu_fuse`. It needs torch, safetensors, numpy
and rich, no vLLM (and numba, which comes with vLLM, for the host's compiled loops): a target's
tensors are mapped from a safetensors file into parameters on the device, with a vector added on the
way by the loader's own `placement`: each of its ways, and the one that it chooses. `--device cpu`
runs the same code without a GPU, to try it; its figures mean nothing and have no goals.

Goals, of the way that is chosen: 90 % of the bandwidth from pinned memory to the device, over the
bytes that must move (the target's, and for a sum on the device the stored vector's). Of every way:
never more extra device memory than the largest tensor. Each way's result is compared with the
CPU's, bit for bit, before it is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.frame import Row, ratios, report
from vllm_rvec.loader.placement import WAYS, Placement
from vllm_rvec.loader.staging import wait_for
from vllm_rvec.vector.stored import Team
from vllm_rvec.vector.stored.dense import DenseTensor
from vllm_rvec.vector.stored.int8 import Int8Tensor
from vllm_rvec.vector.stored.sparse import GapsTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from vllm_rvec.vector.stored import StoredTensor

ALPHA = 0.3
ALPHA_32 = torch.tensor(ALPHA, dtype=torch.float32)
BANDWIDTH_GOAL = 0.9
HIDDEN, INNER = 4096, 14336
TINY_HIDDEN, TINY_INNER = 64, 160
BANDWIDTH_BYTES = 256 << 20
CHANGED_SHARE = 0.1


def main() -> None:
    """Make the tensors, compare each way with the CPU, time it beside the bandwidth."""
    options = _options()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("this torch sees no GPU; `--device cpu` runs the same code, to try it")
    with tempfile.TemporaryDirectory(prefix="rvec-bench-") as folder:
        make_file(Path(folder) / "weights.safetensors", options.layers, is_tiny=options.tiny)
        rows = list(measure(Path(folder) / "weights.safetensors", device, options.repeats or 5))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU: a rehearsal"
    sys.exit(report(rows, as_json=options.json, title=f"{name}, alpha {ALPHA}"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="`cpu` tries it without a GPU")
    parser.add_argument(
        "--layers",
        type=int,
        default=8,
        help="of a 7B's shape, 0.29 GB each, 0.76 GB with its vectors",
    )
    parser.add_argument("--tiny", action="store_true", help="small tensors, to try it in seconds")
    parser.add_argument("--repeats", type=int, help="rounds; the median counts")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


def make_file(path: Path, layers: int, *, is_tiny: bool) -> None:
    """Write a target and its vector, dense, sparse and int8, into one safetensors file."""
    hidden, inner = (TINY_HIDDEN, TINY_INNER) if is_tiny else (HIDDEN, INNER)
    shapes = {"qkv": (hidden * 3 // 2, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(layers):
        for name, shape in shapes.items():
            tensors |= _stored(f"{layer}.{name}", shape, generator)
    save_file(tensors, path)


def _stored(
    name: str, shape: tuple[int, int], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    theta = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
    theta.view(-1)[::1001] = -0.0  # zeros keep their sign or lose it, as the formula says
    v = torch.randn(shape, generator=generator) * 5e-4
    scale = v.abs().amax(dim=1) / 127
    changed = torch.rand(shape, generator=generator) < CHANGED_SHARE
    return {
        f"{name}.theta": theta,
        f"{name}.dense": v.bfloat16(),
        f"{name}.int8": (v / scale.unsqueeze(1)).round().to(torch.int8),
        f"{name}.scale": scale,
    } | {f"{name}.{part}": value for part, value in _sparse(v.bfloat16(), changed).items()}


def _sparse(v: torch.Tensor, changed: torch.Tensor) -> dict[str, torch.Tensor]:
    """Keep values at some places, and how many zeros come before each, up to 255: FORMAT.md."""
    flat = changed.reshape(-1).clone()
    flat[255::256] = True  # a place at least so often that no gap is too wide
    positions = flat.nonzero().reshape(-1)
    gaps = positions.diff(prepend=torch.tensor([-1])) - 1
    values = torch.where(changed, v, 0).reshape(-1)[positions]
    return {"values": values, "gaps": gaps.to(torch.uint8)}


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor of the target, and the vector's in one encoding."""

    theta: torch.Tensor
    stored: StoredTensor
    parts: tuple[torch.Tensor, ...]
    """What `stored` was opened from."""


def measure(path: Path, device: torch.device, repeats: int) -> Iterator[Row]:
    """Yield the bandwidth, then for each kind of vector and each way: its rows."""
    pinned, pageable = (_bandwidth(device, is_pinned=is_pinned) for is_pinned in (True, False))
    yield Row(
        "host to device, pageable / pinned",
        (pageable / pinned,),
        note=f"{pageable / 1e9:.1f} / {pinned / 1e9:.1f} GB/s",
    )
    team, is_gpu = Team(), device.type == "cuda"
    for kind, pairs in open_file(path).items():
        outs = [torch.empty_like(pair.theta, device=device) for pair in pairs]
        for name, ways in {**{str(way): (way,) for way in WAYS}, "chosen": WAYS}.items():
            load = Load(Placement(device, team, ways), pairs, outs)
            _check(load)
            goal = BANDWIDTH_GOAL if is_gpu and ways == WAYS else None
            yield from _timed(f"{kind}, {name}", load, pinned, goal, repeats)
            if is_gpu:
                yield _memory(f"{kind}, {name}", load)


def open_file(path: Path) -> dict[str, list[Pair]]:
    """Map the tensors, and open the vector's in each encoding as the loader does."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - its API
    names = sorted(name.removesuffix(".theta") for name in tensors if name.endswith(".theta"))
    return {
        kind: [opened(kind, name, tensors) for name in names] for kind in ("dense", "gaps", "int8")
    }


def opened(kind: str, name: str, tensors: Mapping[str, torch.Tensor]) -> Pair:
    """Open one tensor."""
    theta = tensors[f"{name}.theta"]
    if kind == "dense":
        v = tensors[f"{name}.dense"]
        return Pair(theta, DenseTensor(v), (v,))
    if kind == "int8":
        steps, scale = tensors[f"{name}.int8"], tensors[f"{name}.scale"]
        return Pair(theta, Int8Tensor(steps, scale), (steps, scale))
    values, gaps = tensors[f"{name}.values"], tensors[f"{name}.gaps"]
    shape = (theta.shape[0], theta.shape[1])
    return Pair(theta, GapsTensor(name, shape, values, gaps), (values, gaps))


@dataclass(frozen=True, slots=True)
class Load:
    """All tensors, brought to the device."""

    placement: Placement
    pairs: list[Pair]
    outs: list[torch.Tensor]

    def run(self) -> tuple[float, int]:
        """Return the seconds, and the bytes that had to move."""
        before = self.placement.sent_bytes
        seconds = _seconds(self.placement.device, self._place)
        return seconds, self.placement.sent_bytes - before

    def run_plain(self) -> float:
        """Move theta alone, as vLLM does; return the seconds."""
        return _seconds(self.placement.device, self._copy)

    def _place(self) -> None:
        for pair, out in zip(self.pairs, self.outs, strict=True):
            self.placement.place(pair.theta, 0, [(pair.stored, ALPHA)], out)

    def _copy(self) -> None:
        for pair, out in zip(self.pairs, self.outs, strict=True):
            out.copy_(pair.theta)


def _check(load: Load) -> None:
    """Compare with the CPU's sum, until a way was chosen where there are several."""
    for _ in range(1 + 2 * len(WAYS) // len(load.pairs)):
        for out in load.outs:
            out.zero_()
        load.run()
        for number, (pair, out) in enumerate(zip(load.pairs, load.outs, strict=True)):
            expected = (pair.theta.float() + ALPHA_32 * _whole(pair)).bfloat16()
            different = out.cpu().view(torch.int16) != expected.view(torch.int16)
            if different.any():
                raise AssertionError(
                    f"tensor {number}: {int(different.sum())} results are not the CPU's bits"
                )


def _whole(pair: Pair) -> torch.Tensor:
    """Decode a tensor of a vector at once, on the CPU, by no code of the package."""
    first, *others = pair.parts
    if pair.stored.kind == "dense":
        return first.float()
    if pair.stored.kind == "int8":
        return first.float() * others[0].unsqueeze(1)
    v = torch.zeros(pair.theta.numel())
    v[torch.cumsum(others[0].long() + 1, 0) - 1] = first.float()
    return v.view(pair.theta.shape)


def _timed(name: str, load: Load, pinned: float, goal: float | None, repeats: int) -> Iterator[Row]:
    rounds = [(load.run(), load.run_plain()) for _ in range(repeats)]
    seconds = [own[0] for own, _ in rounds]
    moved = rounds[0][0][1]
    chosen = ", ".join(map(str, load.placement.chosen.values()))
    yield Row(
        f"{name}: share of the pinned bandwidth",
        tuple(moved / took / pinned for took in seconds),
        goal,
        limit="1",
        at_least=True,
        note=f"{moved / statistics.median(seconds) / 1e9:.1f} GB/s of {moved / 1e9:.2f} GB"
        + (f": {chosen}" if name.endswith("chosen") else ""),
    )
    yield Row(f"{name}: seconds / plain, pageable", **ratios(seconds, [own for _, own in rounds]))


def _memory(name: str, load: Load) -> Row:
    device = load.placement.device
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    load.run()
    extra = torch.cuda.max_memory_allocated(device) - before
    largest = max(pair.theta.nbytes for pair in load.pairs)
    return Row(
        f"{name}: extra device memory / largest tensor",
        (extra / largest,),
        1.0,
        limit="0",
        note=f"{extra / 1e6:.0f} of {largest / 1e6:.0f} MB",
    )


def _bandwidth(device: torch.device, *, is_pinned: bool) -> float:
    """Return bytes a second from the host to the device, the best of six."""
    size = BANDWIDTH_BYTES if device.type == "cuda" else BANDWIDTH_BYTES // 16
    host = torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned and device.type == "cuda")
    host.zero_()
    there = torch.empty(size, dtype=torch.uint8, device=device)

    def copy() -> None:
        there.copy_(host, non_blocking=True)

    return size / min(_seconds(device, copy) for _ in range(6))


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    wait_for(device)
    started = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
