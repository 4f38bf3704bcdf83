"""The README.md of an exported adapter: what it is, and how much of the vector it holds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from vllm_rvec.checkpoint.hub import is_hub_name
from vllm_rvec.vector.writer import TOOL, now

if TYPE_CHECKING:
    from vllm_rvec.checkpoint.fetch import Located
    from vllm_rvec.vector.lora.exporting import LoraExport
    from vllm_rvec.vector.manifest import Donor, Manifest

__all__ = ["make_adapter_card"]

SHOWN_CHARACTERS = 200


def make_adapter_card(made: LoraExport, manifest: Manifest, vector: Located, digest: str) -> str:
    """Write an adapter's model card.

    Args:
        made: The adapter.
        manifest: The vector's.
        vector: What the vector is called.
        digest: The blake3 of the vector's manifest.

    Returns:
        Markdown with YAML front matter, as the Hub's README.md.
    """
    summary = (
        f"A low-rank approximation of a stored vector, `v = {manifest.formula}`. It keeps "
        f"{made.kept:.2%} of the vector's energy, `||v||^2`, and {made.kept_of_linear:.2%} of that "
        "of the linear weights."
    )
    left_out = [f"- {why}: {share:.2%} of the energy" for why, share in made.left_out.items()]
    lines = [
        "---",
        *([f"base_model: {json.dumps(made.base)}"] if is_hub_name(made.base) else []),
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags: [lora, rvec, task-vector]",
        "---",
        "",
        "# A reasoning vector as a LoRA adapter",
        "",
        summary,
        *(["", "Left out:", "", *left_out] if left_out else []),
        "",
        *_usage(made.max_lora_rank),
        *_provenance(made, manifest, vector, digest),
        "",
    ]
    return "\n".join(lines)


def _provenance(made: LoraExport, manifest: Manifest, vector: Located, digest: str) -> list[str]:
    return [
        "| | |",
        "| --- | --- |",
        f"| vector | {_code(vector.id)} {_revision(vector.revision)}, manifest blake3 {digest} |",
        f"| tuned | {_donor(manifest.donors.tuned)} |",
        f"| base | {_donor(manifest.donors.base)} |",
        f"| rank | {made.rank}, scaling {made.scaling:g} |",
        f"| made | {now()} by {_code(TOOL)} |",
    ]


def _usage(max_rank: int | None) -> list[str]:
    if max_rank is None:
        return ["Its rank is higher than any that vLLM serves.", ""]
    command = (
        f"vllm serve BASE --enable-lora --lora-modules rvec=ADAPTER --max-lora-rank {max_rank}"
    )
    return ["```sh", command, "```", ""]


def _donor(donor: Donor) -> str:
    return f"{_code(donor.id)} {_revision(donor.revision)}, license {_code(donor.license or '-')}"


def _revision(revision: str | None) -> str:
    return _code(revision) if revision else "(no revision)"


def _code(text: str) -> str:
    """Show a text of whoever made the vector as what it is: never markup, on one line."""
    shown = "".join(c if c.isprintable() and c not in "`|" else " " for c in text)
    return f"`{shown[:SHOWN_CHARACTERS] or ' '}`"
