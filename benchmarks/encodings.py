"""What each encoding of a vector takes and loses: on the demo's, and on a simulated RL update.

`python -m benchmarks.encodings`; nothing is written. RL leaves most bf16 weights of a model as they
are (arXiv:2505.11711); what it moves, it moves by little. The simulation: seeded normal weights in
bf16, of which a share moves to the next bf16 number, up or down.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from vllm_rvec.arithmetic import difference
from vllm_rvec.cli.inspect_tables import costs_table
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.encoding_costs import encoding_costs, tensors_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_rvec.vector.encoding_costs import EncodingCost

DEMO = Path(__file__).parent.parent / "examples" / "reasoning_in_miniature" / "vector"
SHAPES = {"q_proj": (896, 896), "k_proj": (128, 896), "up_proj": (1216, 896)}
"""Of one layer of Qwen2-0.5B, its feed-forward part cut to a quarter."""
SHARES = (0.05, 0.3)
WEIGHT_SCALE = 0.02


def main() -> None:
    """Measure, and print a table for each vector."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    torch.set_num_threads(1)  # small matrices: more threads wait for each other
    measured = {"the demo's vector": encoding_costs(tensors_of(VectorReader(DEMO)))}
    for share in SHARES:
        name = f"simulated RL update, {share:.0%} of the bf16 weights one unit off"
        measured[name] = encoding_costs(simulated_update(share))
    if options.json:
        print(json.dumps({name: [facts(c) for c in costs] for name, costs in measured.items()}))
        return
    for name, costs in measured.items():
        Console().print(costs_table(costs, name))


def simulated_update(share: float) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the exact difference of bf16 weights and the same with a share of them moved."""
    generator = torch.Generator().manual_seed(0)
    for name, shape in SHAPES.items():
        base = (torch.randn(shape, generator=generator) * WEIGHT_SCALE).bfloat16()
        is_moved = torch.rand(shape, generator=generator) < share
        step = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        # The next number of a float's format has the next integer as its bits.
        bits = base.view(torch.int16) + (step * is_moved).to(torch.int16)
        yield name, difference(bits.view(torch.bfloat16), base)


def facts(cost: EncodingCost) -> dict[str, object]:
    """Give one encoding's figures."""
    return {
        "encoding": cost.name,
        "size_bytes": cost.size_bytes,
        "of_dense_float32": cost.ratio("F32"),
        "of_dense_bfloat16": cost.ratio("BF16"),
        "error": cost.error,
        "worst": cost.worst,
    }


if __name__ == "__main__":
    main()
