"""Add on the host or on the device? With pinned staging or without? The fuse path alone, on a GPU.

Run by `make bench-gpu`; alone: `python -m benchmarks.gpu_fuse`. It needs torch, safetensors, numpy
and rich, no vLLM: a target's tensors are mapped from a safetensors file into parameters on the
device, with a vector added on the way, as `placement` does it. `--device cpu` runs the same code
without a GPU, to try it; its figures mean nothing and have no goals.

Goals: 90 % of the bandwidth from pinned memory to the device, over the bytes that must move (the
target's, and for a sum on the device the stored vector's); never more extra device memory than the
largest tensor. Every way's result is compared with the CPU's, bit for bit, before it is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.frame import Row, ratios, report
from benchmarks.placement import DenseParts, Int8Parts, SparseParts, Staging, placements, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.placement import Parts

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
    with tempfile.TemporaryDirectory(prefix="rvec-bench-") as folder:
        make_file(Path(folder) / "weights.safetensors", options.layers, is_tiny=options.tiny)
        rows = list(measure(Path(folder) / "weights.safetensors", device, options.repeats or 5))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU: a rehearsal"
    sys.exit(report(rows, as_json=options.json, title=f"{name}, alpha {ALPHA}"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=8, help="of a 7B's shape, 0.35 GB each")
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


def measure(path: Path, device: torch.device, repeats: int) -> Iterator[Row]:
    """Yield the bandwidth, then a row for each way and kind of vector, then the memory."""
    is_gpu = device.type == "cuda"
    pinned, pageable = (_bandwidth(device, is_pinned=is_pinned) for is_pinned in (True, False))
    yield Row(
        "host to device, pageable / pinned",
        (pageable / pinned,),
        note=f"{pageable / 1e9:.1f} / {pinned / 1e9:.1f} GB/s",
    )
    thetas, vectors = open_file(path)
    outs = [torch.empty_like(theta, device=device) for theta in thetas]
    for kind, parts in vectors.items():
        for name, place in placements(Staging(device)).items():
            _check(place, thetas, parts, outs)
            yield from _timed(f"{kind}, {name}", place, (thetas, parts, outs), pinned, repeats)
            if is_gpu:
                yield _memory(f"{kind}, {name}", place, (thetas, parts, outs))


def open_file(path: Path) -> tuple[list[torch.Tensor], dict[str, list[Parts]]]:
    """Return the target's tensors, mapped, and the parts of each kind of vector."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - its API
    names = sorted(name.removesuffix(".theta") for name in tensors if name.endswith(".theta"))
    dense = [DenseParts(tensors[f"{name}.dense"]) for name in names]
    int8 = [Int8Parts(tensors[f"{name}.int8"], tensors[f"{name}.scale"]) for name in names]
    sparse = [SparseParts(tensors[f"{name}.values"], tensors[f"{name}.gaps"]) for name in names]
    thetas = [tensors[f"{name}.theta"] for name in names]
    return thetas, {"dense": [*dense], "sparse": [*sparse], "int8": [*int8]}


def _check(
    place: Callable[..., int],
    thetas: list[torch.Tensor],
    vector: list[Parts],
    outs: list[torch.Tensor],
) -> None:
    for number, (theta, parts, out) in enumerate(zip(thetas, vector, outs, strict=True)):
        out.zero_()
        place(theta, parts, ALPHA, out)
        _wait(out.device)
        expected = (theta.float() + ALPHA_32 * _whole(parts, theta)).bfloat16()
        if not torch.equal(out.cpu().view(torch.int16), expected.view(torch.int16)):
            count = int((out.cpu().view(torch.int16) != expected.view(torch.int16)).sum())
            raise AssertionError(f"tensor {number}: {count} results are not the CPU's, bit for bit")


def _whole(parts: Parts, theta: torch.Tensor) -> torch.Tensor:
    """Decode a tensor of a vector at once, on the CPU: nothing that `placement` does is used."""
    tensors = parts.tensors()
    if isinstance(parts, DenseParts):
        return tensors[0].float()
    if isinstance(parts, Int8Parts):
        return tensors[0].float() * tensors[1].unsqueeze(1)
    v = torch.zeros(theta.numel())
    v[torch.cumsum(tensors[1].long() + 1, 0) - 1] = tensors[0].float()
    return v.view(theta.shape)


Sides = tuple[list[torch.Tensor], "list[Parts]", list[torch.Tensor]]


def _load(place: Callable[..., int], sides: Sides) -> tuple[float, int]:
    """Place all tensors; return the seconds, and the bytes that had to move."""
    device = sides[2][0].device
    _wait(device)
    started = time.perf_counter()
    moved = sum(place(theta, parts, ALPHA, out) for theta, parts, out in zip(*sides, strict=True))
    _wait(device)
    return time.perf_counter() - started, moved


def _timed(
    name: str, place: Callable[..., int], sides: Sides, pinned: float, repeats: int
) -> Iterator[Row]:
    rounds = [(_load(place, sides), _load(plain, sides)) for _ in range(repeats)]
    seconds = [own[0] for own, _ in rounds]
    moved = rounds[0][0][1]
    is_goal = sides[2][0].device.type == "cuda" and "pinned" in name
    yield Row(
        f"{name}: share of the pinned bandwidth",
        tuple(moved / took / pinned for took in seconds),
        BANDWIDTH_GOAL if is_goal else None,
        limit="1",
        at_least=True,
        note=f"{moved / statistics.median(seconds) / 1e9:.1f} GB/s of {moved / 1e9:.2f} GB",
    )
    others = [other[0] for _, other in rounds]
    yield Row(f"{name}: seconds / plain, pageable", **ratios(seconds, others))


def _memory(name: str, place: Callable[..., int], sides: Sides) -> Row:
    device = sides[2][0].device
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    _load(place, sides)
    extra = torch.cuda.max_memory_allocated(device) - before
    largest = max(theta.nbytes for theta in sides[0])
    return Row(
        f"{name}: extra device memory / largest tensor",
        (extra / largest,),
        1.0,
        limit="0",
        note=f"{extra / 1e6:.0f} of {largest / 1e6:.0f} MB",
    )


def _bandwidth(device: torch.device, *, is_pinned: bool) -> float:
    """Return bytes a second from the host to the device, the best of five."""
    size = BANDWIDTH_BYTES if device.type == "cuda" else BANDWIDTH_BYTES // 16
    host = torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned and device.type == "cuda")
    host.zero_()
    there, best = torch.empty(size, dtype=torch.uint8, device=device), float("inf")
    for _ in range(6):
        _wait(device)
        started = time.perf_counter()
        there.copy_(host, non_blocking=True)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return size / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
