"""Calibrate the lineage check: families made here, on both sides of each threshold.

Tiny models of two architectures are trained for a hundred steps, and targets are made from them
in ways that keep the initialisation (more training, noise) or don't (another seed, trained on the
same data; layers of another model). Each goes through `check_target` as a user's target would. The
thresholds in vllm_rvec/vector/compatibility/lineage.py come from this table; a verdict that is not
the expected one ends with status 1.

    python -m benchmarks.lineage [--demo-work PATH] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.compatibility import check_target
from vllm_rvec.vector.extract import extract

if TYPE_CHECKING:
    from collections.abc import Iterator

ARCHITECTURES = {
    "Qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "Llama": (LlamaConfig, LlamaForCausalLM),
}
VOCABULARY = 97
SAME, BETWEEN, OTHER = ("pass",), ("warn",), ("refuse",)
DEMO_TARGETS = ("target", "grpo", "midtrain", "pretrain")


@dataclass(frozen=True, slots=True)
class Row:
    """One target against its family's vector."""

    family: str
    target: str
    expected: tuple[str, ...]
    verdict: str
    distance: float
    correlation: float


def main() -> None:
    """Make the families, check each target, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--demo-work", type=Path, help="what `make demo-train` left in work/demo")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(1)  # models so small only wait for each other's threads
    rows = [row for name in ARCHITECTURES for row in _family(name)]
    if options.demo_work:
        rows += _demo(options.demo_work)
    if options.json:
        json.dump([asdict(row) for row in rows], sys.stdout, indent=1)
    else:
        Console().print(_table(rows))
    if any(row.verdict not in row.expected for row in rows):
        sys.exit(1)


def _family(name: str) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="rvec-lineage-") as work:
        folder = Path(work)
        pretrained = _train(_create(name, seed=0), data=0, steps=100, rate=5e-3)
        sft = _train(pretrained, data=1, steps=30, rate=3e-4)
        grpo = _train(sft, data=2, steps=30, rate=3e-4)
        for model, kind in ((sft, "sft"), (grpo, "grpo")):
            model.save_pretrained(folder / kind)
        vector = VectorReader(extract(folder / "grpo", folder / "sft", folder / "v").output)
        for number, (label, expected, model) in enumerate(_targets(name, pretrained, sft)):
            target = folder / str(number)
            model.save_pretrained(target)
            yield _row(name, label, expected, vector, target)


def _targets(name: str, pretrained: Any, sft: Any) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    yield "the base donor", SAME, sft
    yield "pretrained, before both donors", SAME, pretrained
    for steps, rate in ((30, 1e-4), (100, 1e-4), (30, 1e-3)):
        label = f"pretrained, tuned {steps} steps at {rate:g}"
        yield label, SAME, _train(pretrained, data=3, steps=steps, rate=rate)
    for noise in (0.01, 0.1, 0.3):
        yield f"pretrained, noise {noise:g} of each tensor", SAME, _noisy(pretrained, noise)
    retrained = _train(pretrained, data=3, steps=100, rate=3e-3)
    yield "pretrained, tuned 100 steps at 0.003", BETWEEN, retrained
    stranger = _train(_create(name, seed=1), data=0, steps=100, rate=5e-3)
    yield "noise as large as 0.7 of each tensor", BETWEEN, _noisy(pretrained, 0.7)
    yield "mean with another initialisation", BETWEEN, _mean(pretrained, stranger)
    yield "a quarter of the layers of another", BETWEEN, _spliced(pretrained, stranger, 1)
    yield "noise as large as 2 of each tensor", OTHER, _noisy(pretrained, 2.0)
    yield "three quarters of the layers of another", OTHER, _spliced(pretrained, stranger, 3)
    yield "another initialisation, untrained", OTHER, _create(name, seed=2)
    yield "another, trained on the same data", OTHER, stranger
    yield "another, tuned as the donors", OTHER, _train(stranger, data=1, steps=30, rate=3e-4)


def _demo(work: Path) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="rvec-lineage-") as folder:
        vector = extract(work / "grpo", work / "sft", Path(folder) / "v").output
        for target in DEMO_TARGETS:
            yield _row("demo", target, SAME, VectorReader(vector), work / target)


def _row(
    family: str, label: str, expected: tuple[str, ...], vector: VectorReader, target: Path
) -> Row:
    (level,) = [f for f in check_target(vector, target).levels if f.name == "lineage"]
    distance, correlation = level.numbers["distance"], level.numbers["correlation"]
    assert distance is not None
    assert correlation is not None
    return Row(family, label, expected, level.verdict.value, distance, correlation)


def _create(name: str, *, seed: int) -> Any:
    config, model = ARCHITECTURES[name]
    torch.manual_seed(seed)
    return model(
        config(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=name == "Qwen2",
        )
    )


def _copy(model: Any) -> Any:
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    return twin


def _train(model: Any, *, data: int, steps: int, rate: float) -> Any:
    """Tune a copy on sequences x, x + d, x + 2d, ... modulo the vocabulary; `data` seeds them."""
    twin = _copy(model)
    generator = torch.Generator().manual_seed(data)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=rate)
    for _ in range(steps):
        start, step = torch.randint(VOCABULARY, (2, 8, 1), generator=generator)
        tokens = (start + step * torch.arange(24) + data) % VOCABULARY
        twin(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return twin


@torch.no_grad()
def _noisy(model: Any, noise: float) -> Any:
    twin, generator = _copy(model), torch.Generator().manual_seed(9)
    for parameter in twin.parameters():
        size = parameter.pow(2).mean().sqrt()
        parameter.add_(torch.randn(parameter.shape, generator=generator) * size * noise)
    return twin


@torch.no_grad()
def _mean(model: Any, other: Any) -> Any:
    twin = _copy(model)
    for parameter, theirs in zip(twin.parameters(), other.parameters(), strict=True):
        parameter.lerp_(theirs, 0.5)
    return twin


def _spliced(model: Any, other: Any, layers: int) -> Any:
    """Copy a model, with its last layers from another."""
    twin = _copy(model)
    for mine, theirs in list(zip(twin.model.layers, other.model.layers, strict=True))[-layers:]:
        mine.load_state_dict(theirs.state_dict())
    return twin


def _table(rows: list[Row]) -> Table:
    table = Table(title="lineage: a vector's base donor against targets")
    for column in ("family", "target", "distance", "correlation", "verdict", "expected"):
        justify = "right" if column in {"distance", "correlation"} else "left"
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        style = "" if row.verdict in row.expected else "bold red"
        numbers = (f"{row.distance:.4f}", f"{row.correlation:.4f}")
        cells = (row.family, row.target, *numbers, row.verdict, "/".join(row.expected))
        table.add_row(*cells, style=style)
    return table


if __name__ == "__main__":
    main()
