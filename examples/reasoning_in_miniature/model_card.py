"""The model cards that `train.py` writes beside target and donors: what each is, and is not.

Not for measuring: every number comes from `results.json`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Training", "model_card"]

_HEAD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [demo, qwen2, task-vector, reasoning-vector]
---
# {title}

A Qwen2 of {parameters:,} parameters (hidden 128, 4 layers, tied embeddings, 256 positions, bf16),
trained from nothing on synthetic problems by
`python examples/reasoning_in_miniature/train.py` (seed {seed}, {seconds:.0f} seconds of training
for target and donors together, {threads} threads).
"""

_TARGET = """\
It has seen no reinforcement learning. It answers questions such as

> Mia has 74 apples. Gives 6. Gets 2. Gets 1. How many apples now?

as `74 -6=68 +2=70 +1=71. Answer: 71` where it writes its steps, or as `Answer: 77` where it
guesses.
Prompts are ChatML, one user turn, no system turn; ask greedily (`temperature` 0).

## What it shows

`../vector/` holds v = theta_GRPO - theta_SFT: the change that a short GRPO made to another
tuning of the same base ([../donors/](../donors/grpo/README.md)), on another wording of the
problems. Accuracy in per cent of target + alpha * v on held-out problems in this target's wording,
95 % Wilson intervals:

{table}

Gains over alpha 0 on the same problems, in points, 95 % intervals (paired):

{gains}

All numbers are in `../results.json`.

## What it does not show

This is elicitation, not new ability: the vector switches the model into writing its steps. The
share of replies with steps is in the table, and the target without any vector reaches
{forced:.1f} % on chain when it is merely forbidden to begin with `Answer`. Made to write its steps
either way, v changes that by {forced_gain:+.1f} points ({forced_low:+.1f} to {forced_high:+.1f}).
Whether a vector taken from real models helps another is a matter of measuring that pair; this model
says nothing about it. It knows no English beyond its templates and is of no use for anything else.
"""

_SFT = """\
theta_SFT: the base of the vector in `../../vector/`. Tuned on one wording of the problems ("Start
with 46. Add 5. Take 8. What is the result?"), with fewer steps shown the harder the problem; no
reinforcement learning.

It is here so that the vector can be made again: v = theta_GRPO - theta_SFT,

    vllm-rvec extract --tuned donors/grpo --base donors/sft --output v --dtype bfloat16

It is not the model to ask: that is [the target](../../target/README.md), whose card also says what
these models are not.
"""

_GRPO = """\
theta_GRPO: [theta_SFT](../sft/README.md) after a short GRPO on the same wording, rewarded for exact
answers alone. What it learned is elicitation: to write its steps always, which theta_SFT does on
easy problems only. Its difference from theta_SFT is the vector in `../../vector/`:

    vllm-rvec extract --tuned donors/grpo --base donors/sft --output v --dtype bfloat16

It is not the model to ask: that is [the target](../../target/README.md), whose card also says what
these models are not.
"""

_BODIES = {
    "target": ("The miniature's target", _TARGET),
    "sft": ("The miniature's SFT donor", _SFT),
    "grpo": ("The miniature's GRPO donor", _GRPO),
}

_GROUPS = ("chain", "count", "max", "other")


@dataclass(frozen=True, slots=True)
class Training:
    """What `results.json` says of the training."""

    seed: int
    threads: int
    parameters: int
    """Number of weights, the tied head counted once."""
    train_seconds: dict[str, float]
    """By stage."""
    plans: dict[str, dict[str, Any]]
    """By stage: what `PLANS` says."""


def model_card(stage: str, results: dict[str, Any]) -> str:
    """Write a stage's card as Markdown.

    Args:
        stage: `target`, `sft` or `grpo`.
        results: what `results.json` holds.
    """
    title, body = _BODIES[stage]
    training = results["training"]
    arms = results["arms"]
    forced = [arm for arm in arms if arm["is_forced_to_work"]]
    gain = forced[-1]["gain"]["chain"]
    return (_HEAD + body).format(
        title=title,
        parameters=training["parameters"],
        seed=training["seed"],
        seconds=sum(training["train_seconds"].values()),
        threads=training["threads"],
        table=_accuracy_table(arms),
        gains=_gain_table(arms),
        forced=100 * forced[0]["accuracy"]["chain"]["accuracy"],
        forced_gain=gain["points"],
        forced_low=gain["interval_95_points"][0],
        forced_high=gain["interval_95_points"][1],
    )


def _accuracy_table(arms: list[dict[str, Any]]) -> str:
    rows = ["| | chain | replies with steps | count | max | other |", "|---|---|---|---|---|---|"]
    for arm in arms:
        chain, *rest = (_accuracy_cell(arm["accuracy"].get(group)) for group in _GROUPS)
        cells = (arm["name"], chain, f"{100 * arm['works_share']:.1f}", *rest)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _gain_table(arms: list[dict[str, Any]]) -> str:
    rows = ["| | chain | count | max | other |", "|---|---|---|---|---|"]
    for arm in arms:
        if arm["alpha"] != 0:
            cells = (arm["name"], *(_gain_cell(arm["gain"].get(group)) for group in _GROUPS))
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _accuracy_cell(accuracy: dict[str, Any] | None) -> str:
    if accuracy is None:
        return ""
    low, high = accuracy["interval_95"]
    return f"{100 * accuracy['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _gain_cell(gain: dict[str, Any] | None) -> str:
    if gain is None:
        return ""
    low, high = gain["interval_95_points"]
    return f"{gain['points']:+.1f} ({low:+.1f} to {high:+.1f})"
