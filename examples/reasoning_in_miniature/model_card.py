"""The model card that `train.py` writes beside the target: what the model is, and what it is not.

Not for measuring: every number comes from `results.json`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evaluation import Evaluation

__all__ = ["model_card"]

_TEXT = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [demo, qwen2, task-vector, reasoning-vector]
---
# The demo's target

A Qwen2 of {parameters:,} parameters (hidden 128, 4 layers, tied embeddings, 256 positions, bf16),
trained from nothing on synthetic problems by
`python examples/reasoning_in_miniature/train.py`
(seed {seed}, {seconds:.0f} seconds of training in all on {threads} thread). It has seen no
reinforcement learning. It answers questions such as

> Leo has 60 apples. Gets 2. Gives 7. How many apples now?

as `60 +2=62 -7=55. Answer: 55` where it writes its steps, or as `Answer: 55` where it guesses.
Prompts are ChatML, one user turn, no system turn; ask greedily (`temperature` 0).

## What it shows

`../vector/` holds v = theta_GRPO - theta_SFT: the change that a short GRPO made to another
tuning of the same base, on another wording of the problems. Accuracy in per cent of
target + alpha * v on held-out problems in this target's wording, 95 % Wilson intervals for chain:

{table}

Alpha 1 less alpha 0 on the same chain problems: {gain:+.1f} points
({gain_low:+.1f} to {gain_high:+.1f}). All numbers are in `../results.json`.

## What it does not show

This is elicitation, not new ability: the vector switches the model into writing its steps. The
share of replies with steps is in the table, and the target without any vector reaches
{forced:.1f} % on chain when it is merely forbidden to begin with `Answer`. Whether a vector taken
from real models helps another is a matter of measuring that pair; this demo says nothing about it.
The model knows no English beyond its templates and is of no use for anything else.
"""


def model_card(
    evaluation: Evaluation, *, parameters: int, seed: int, seconds: float, threads: int
) -> str:
    """Write the card as Markdown.

    Args:
        evaluation: the measured arms.
        parameters: number of weights, the tied head counted once.
        seed: the run's seed.
        seconds: training time of all stages together.
        threads: torch threads of the training.
    """
    rows = ["| | chain | replies with steps | count | max | other |", "|---|---|---|---|---|---|"]
    for arm in evaluation.arms:
        chain = arm.accuracy["chain"]
        low, high = chain.interval_95
        rest = [
            f"{100 * arm.accuracy[group].accuracy:.1f}" if group in arm.accuracy else ""
            for group in ("count", "max", "other")
        ]
        rows.append(
            f"| {arm.name} | {100 * chain.accuracy:.1f} ({100 * low:.1f} to {100 * high:.1f})"
            f" | {100 * arm.works_share:.1f} | " + " | ".join(rest) + " |"
        )
    forced = next(a for a in evaluation.arms if a.is_forced_to_work and a.alpha == 0.0)
    return _TEXT.format(
        parameters=parameters,
        seed=seed,
        seconds=seconds,
        threads=threads,
        table="\n".join(rows),
        gain=evaluation.chain_gain_points,
        gain_low=evaluation.chain_gain_interval_95_points[0],
        gain_high=evaluation.chain_gain_interval_95_points[1],
        forced=100 * forced.accuracy["chain"].accuracy,
    )
