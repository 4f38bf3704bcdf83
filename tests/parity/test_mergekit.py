"""Our merge beside mergekit's task_arithmetic: the same sum, and every differing bit explained.

mergekit adds both differences to the base, we add one difference to the target. On paper both are
target + alpha * (tuned - base); in float32 the two orders round differently, and so a sum that lies
near the middle between two bf16 numbers may fall to either side. Where the sum is nearly nothing,
float32's errors are all that is left; bf16 keeps them, and a unit of bf16 is no measure.

mergekit has an environment of its own: `make mergekit` makes it, `make parity` runs this.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import yaml
from rich.console import Console
from rich.table import Table

from tests.parity.families import KINDS, make_family
from tests.support.checkpoints import tensors
from vllm_rvec.vector.extract import extract
from vllm_rvec.vector.merge import merge
from vllm_rvec.vector.recipe import RecipeVector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from tests.support.checkpoints import Family

pytestmark = pytest.mark.parity

Tensors = dict[str, torch.Tensor]

FLOAT32_ERRORS = 2**-22
"""What a few roundings to float32 can make of a number, relative to it."""

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def mergekit() -> Path:
    """The command mergekit-yaml; without its environment only a run that asked for it fails."""
    named = os.environ.get("MERGEKIT_ENV")
    command = Path(named or ROOT / ".venv-mergekit").absolute() / "bin" / "mergekit-yaml"
    if not command.exists() and not named:
        pytest.skip("mergekit's environment is not there: make mergekit")
    assert command.exists(), f"MERGEKIT_ENV is set, but there is no {command}"
    return command


@dataclass(frozen=True, slots=True)
class Case:
    """One merge, as both are told."""

    name: str
    kind: str
    weight: Any
    """mergekit's parameter."""
    alpha: Any
    """Ours; what is no number goes by a recipe."""
    expected: Callable[[str], float] | None = None
    """A tensor's alpha, written out; of a number, that number."""

    def alpha_of(self, name: str) -> float:
        """Return what a tensor's difference is multiplied by."""
        return float(self.alpha) if self.expected is None else self.expected(name)


def gradient(name: str) -> float:
    """From 0.3 to 1 over three layers; mergekit has the first number for what is in none."""
    layer = int(name.split(".")[2]) if ".layers." in name else 0
    return (0.3, 0.5 * 0.3 + 0.5 * 1.0, 1.0)[layer]


def by_module(name: str) -> float:
    """Attention from 0.7 to -0.2, MLP from 0 over 1 to 0.5, nothing else."""
    if "self_attn" in name:
        return (0.7, 0.5 * 0.7 + 0.5 * -0.2, -0.2)[int(name.split(".")[2])]
    return (0.0, 1.0, 0.5)[int(name.split(".")[2])] if ".mlp." in name else 0.0


FILTERS = [
    {"filter": "self_attn", "value": [0.7, -0.2]},
    {"filter": "mlp", "value": [0, 1, 0.5]},
    {"value": 0},
]
KINDS_OF_MODULE = {"attention": [0.7, -0.2], "mlp": [0, 1, 0.5], "default": 0}

CASES = [
    *(Case(f"{kind}, alpha 1.0", kind, 1.0, 1.0) for kind in KINDS),
    Case("qwen2, alpha 0.3", "qwen2", 0.3, 0.3),
    *(Case(f"{kind}, gradient", kind, [0.3, 1], [0.3, 1], gradient) for kind in KINDS),
    *(Case(f"{kind}, filters", kind, FILTERS, KINDS_OF_MODULE, by_module) for kind in KINDS[:2]),
]


@dataclass(frozen=True, slots=True)
class Merged:
    """One model, merged by both."""

    family: Family
    case: Case
    ours: Tensors
    theirs: Tensors


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def merged(
    request: pytest.FixtureRequest, mergekit: Path, tmp_path_factory: pytest.TempPathFactory
) -> Merged:
    """SFT, GRPO and a target of one architecture, merged by both."""
    case: Case = request.param
    folder = tmp_path_factory.mktemp(case.kind.replace(" ", "-"))
    family = make_family(folder, case.kind)
    vector = extract(family.tuned, family.base, folder / "vector").output
    if isinstance(case.alpha, float):
        merge(family.target, [vector], folder / "ours", alphas=[case.alpha])
    else:
        said = RecipeVector(path=str(vector), alpha=case.alpha)
        merge(family.target, [vector], folder / "ours", recipe=[said])
    run_mergekit(mergekit, family, case.weight, folder)
    return Merged(family, case, tensors(folder / "ours"), tensors(folder / "theirs"))


def run_mergekit(mergekit: Path, family: Family, weight: Any, folder: Path) -> None:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(family.base),
        "models": [
            {"model": str(family.tuned), "parameters": {"weight": weight}},
            {"model": str(family.target), "parameters": {"weight": 1.0}},
        ],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = ("--quiet", "--no-copy-tokenizer")
    subprocess.run(
        [mergekit, folder / "recipe.yaml", folder / "theirs", *options],
        check=True,
        timeout=240,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def sides(merged: Merged) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Give each tensor's tuned, base and target in float32."""
    stored = [tensors(f) for f in (merged.family.tuned, merged.family.base, merged.family.target)]
    for name in stored[0]:
        tuned, base, target = (side[name].float() for side in stored)
        yield name, tuned, base, target


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return bf16's bits as integers in the order of the numbers; both zeros are 0."""
    raw = tensor.view(torch.int16).int()
    return torch.where(raw < 0, -(raw & 0x7FFF), raw)


def test_both_write_the_same_tensors(merged: Merged) -> None:
    """Names, shapes and dtype; a tied head is in neither."""
    assert merged.ours.keys() == merged.theirs.keys()
    for name, tensor in merged.ours.items():
        assert tensor.shape == merged.theirs[name].shape
        assert tensor.dtype == merged.theirs[name].dtype == torch.bfloat16


def test_each_is_its_own_order_of_rounding_bit_for_bit(merged: Merged) -> None:
    """Both orders, written out here in float32, give both results in every bit."""
    for name, tuned, base, target in sides(merged):
        alpha = torch.tensor(merged.case.alpha_of(name))
        theirs = (base + (alpha * (tuned - base) + (target - base))).bfloat16()
        ours = (target + alpha * (tuned - base)).bfloat16()
        assert torch.equal(theirs.view(torch.int16), merged.theirs[name].view(torch.int16)), name
        assert torch.equal(ours.view(torch.int16), merged.ours[name].view(torch.int16)), name


def test_what_differs_is_one_unit_of_bf16_or_a_cancelled_sum_and_rare(
    merged: Merged, request: pytest.FixtureRequest
) -> None:
    """And where they differ, the exact sum tells who is nearer; printed by `make parity`."""
    weights = differing = cancelled = nearer = farther = 0
    for name, tuned, base, target in sides(merged):
        ours, theirs = merged.ours[name], merged.theirs[name]
        differs = ours.view(torch.int16) != theirs.view(torch.int16)
        units = (bits(ours) - bits(theirs)).abs()[differs]
        largest = torch.stack([tuned.abs(), base.abs(), target.abs()]).amax(0)[differs]
        is_cancelled = units > 1
        gap = (ours.double() - theirs.double()).abs()[differs]
        assert (gap <= largest * FLOAT32_ERRORS)[is_cancelled].all(), name
        v = tuned.double() - base.double()
        exact = target.double() + float(torch.tensor(merged.case.alpha_of(name))) * v
        error, their_error = ((side.double() - exact).abs()[differs] for side in (ours, theirs))
        weights += ours.numel()
        differing += int(differs.sum())
        cancelled += int(is_cancelled.sum())
        nearer += int((error < their_error).sum())
        farther += int((error > their_error).sum())
    show(request.node.callspec.id, weights, differing - cancelled, cancelled, nearer, farther)
    assert differing < weights / 1000
    assert cancelled < weights / 100_000


def show(kind: str, *counts: int) -> None:
    table = Table("model", "weights", "one unit", "cancelled", "ours nearer", "mergekit nearer")
    table.add_row(kind, *(f"{count:,}" for count in counts))
    Console(width=100).print(table)
