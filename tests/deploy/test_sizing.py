"""deploy/README.md: its tables are what its formulas give, its links lead somewhere."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import pytest

from benchmarks.on_paper import MODELS, Rates, estimate
from tests.deploy.tools import DEPLOY, ROOT

if TYPE_CHECKING:
    from pathlib import Path

README = (DEPLOY / "README.md").read_text()
PARAMETERS = {name.partition(",")[0]: parameters for name, (parameters, _) in MODELS.items()}
ARCHITECTURE = {"7B": (28, 4, 128), "70B": (80, 8, 128), "405B": (126, 8, 128)}
"""Layers, KV heads and head size: Qwen2.5-7B, Llama 3 70B, Llama 3.1 405B."""
TOKENS = 100_000
USABLE_GB = 0.9 * 80 - 4
RATIOS = {"dense": 1.53, "sparse": 1.46, "int8": 1.29}
STORED = {
    "dense bfloat16": "dense bfloat16 | 50.0 %",
    "int8": "int8 | 25.7 %, 0.5 % | 25.1 %",
    "sparse, 30 % changed": "sparse, and so auto | 46.1 %, 0 | 3.75 %, 0 | 18.1 %",
    "sparse, 5 % changed": "sparse, and so auto | 46.1 %, 0 | 3.75 %",
}
"""Where the README says each share, as its last number."""
DOCUMENTS = sorted(DEPLOY.glob("**/README.md"))


def table(heading: str) -> list[list[str]]:
    """The rows of the first table under a heading."""
    section = README.split(f"### {heading}\n", 1)[1].split("\n#", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def shown(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"


def cache_bytes(model: str) -> int:
    """Of a token."""
    layers, heads, size = ARCHITECTURE[model]
    return 2 * layers * heads * size * 2


def gpus(gigabytes: float) -> int:
    """Of one engine."""
    least: int = 2 ** math.ceil(math.log2(max(1.0, gigabytes / USABLE_GB)))
    return least


def stored_gb(model: str, encoding: str) -> float:
    """By the share that the README shows as measured."""
    said = STORED[encoding]
    assert f"| {said}" in (ROOT / "README.md").read_text()
    return float(said.split("|")[-1].strip(" %")) / 100 * 4 * PARAMETERS[model] / 1e9


def test_memory() -> None:
    """Of fused engines and of a dial, and the GPUs of each."""
    expected = []
    for model, parameters in PARAMETERS.items():
        weights, cache = 2 * parameters / 1e9, cache_bytes(model) * TOKENS / 1e9
        for count in (1, 2, 5):
            one = weights + cache
            dials = [factor * weights + count * cache for factor in (2, 1.5)]
            fused = f"{shown(count * one)}, {count * gpus(one)}"
            cells = [f"{shown(dial)}, {gpus(dial)}" for dial in dials]
            expected.append([model, str(count), fused, *cells])
    assert table("Memory") == expected
    for model in PARAMETERS:
        layers, heads, size = ARCHITECTURE[model]
        assert f"{cache_bytes(model):,} ({model}: {layers}, {heads}, {size})" in README


def test_load_time() -> None:
    """By the benchmarks' own formula, at each bandwidth."""
    expected = []
    for model in MODELS:
        for kind, name in {"plain": "none", **{kind: kind for kind in RATIOS}}.items():
            disks = [Rates(10.6e9, disk * 1e9, RATIOS) for disk in (0.2, 2, 7)]
            cells = [f"{estimate(model, kind, rates).cold_seconds:,.0f}" for rates in disks]
            expected.append([model.partition(",")[0], name, *cells])
    assert table("Load time") == expected


def test_the_benchmarks_own_table() -> None:
    """The same at the measured disk, for a rank and warm too."""
    expected = []
    for model in MODELS:
        for kind in ("plain", *RATIOS):
            one = estimate(model, kind, Rates(10.6e9, 2e9, RATIOS))
            stored = f"{one.vector_bytes / 1e9:.1f}" if kind in RATIOS else "0"
            expected.append(
                f"| {model if kind == 'plain' else ''} | {'none' if kind == 'plain' else kind} "
                f"| {one.weights_bytes / 1e9:.1f} / {stored} "
                f"| {one.warm_seconds:.1f} | {one.cold_seconds:.1f} |".replace("|  |", "| |")
            )
    assert "\n".join(expected) in (ROOT / "benchmarks" / "README.md").read_text()


def test_rates_are_the_measured_ones() -> None:
    """Of the README's run, as the benchmarks' paper takes them."""
    readme = (ROOT / "README.md").read_text()
    for ratio in RATIOS.values():
        assert str(ratio) in readme
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert "10.6 GB/s for a rank" in " ".join(text.split())
    for kind, ratio in RATIOS.items():
        assert f"--{kind}-ratio {ratio}" in README


def test_the_units_patience_covers_a_slow_disk() -> None:
    """TimeoutStartSec, by the row that its comment names."""
    unit = (DEPLOY / "systemd" / "vllm-rvec.service").read_text()
    (row,) = [row for row in table("Load time") if row[:2] == ["70B", "dense"]]
    seconds = int(row[2].replace(",", ""))
    assert f"takes {math.ceil(seconds / 60)} minutes" in unit
    (limit,) = re.findall(r"TimeoutStartSec=(\d+)min", unit)
    assert int(limit) * 60 > 1.5 * seconds


def test_vectors_sizes_and_costs() -> None:
    """Stored, and moved."""
    expected = []
    for model in PARAMETERS:
        for encoding in STORED:
            size = stored_gb(model, encoding)
            cells = [shown(size), f"{size * 0.023:.2f}", shown(size / 1.25)]
            expected.append([model, encoding, *cells])
    assert table("What a vector costs to store and to move") == expected


def test_a_thousand_replicas() -> None:
    """Each for itself, once for each node, passed on."""
    expected = []
    rounds = math.ceil(math.log2(500))
    for encoding in STORED:
        size = stored_gb("70B", encoding)
        times = [1000 * size / 12.5, 500 * size / 12.5, rounds * size / 3.125]
        expected.append([encoding, shown(size), f"{size:,.1f}", *map(shown, times)])
    assert table("A thousand replicas") == expected


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.parent.name)
def test_links_lead_somewhere(document: Path) -> None:
    """Files, folders, and headings in them."""
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", document.read_text()):
        path, _, heading = target.partition("#")
        found = (document.parent / path).resolve() if path else document
        assert found.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
