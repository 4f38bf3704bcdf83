"""Whether a dial engine can answer for a target and a vector, as far as their files say it.

The engine itself has the last word: it looks at every module that the vector changes when it
starts. What is here lets `serve` choose before it starts anything. Imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vllm_rvec.vector.module_names import place_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["dial_problem"]

DIALABLE: Final = frozenset(
    {
        *("gemma2", "gemma3_text", "gpt2", "idefics3", "llama", "mistral", "mixtral"),
        *("olmo2", "paligemma", "phi3", "qwen2", "qwen3", "qwen3_moe"),
    }
)
"""`model_type` of the families that were compared with fused engines, answer by answer."""

UNDIALABLE_KINDS: Final = frozenset({"experts", "router"})
"""Of a mixture: its kernels take all experts' weights at once."""


def dial_problem(config: Mapping[str, object], changed: Iterable[str]) -> str:
    """Say why a dial engine can't serve a target with a vector; empty if nothing speaks against it.

    Args:
        config: The target's config.json.
        changed: Names of the tensors that the vector changes.
    """
    model_type = config.get("model_type")
    if model_type not in DIALABLE:
        return f"models of type {model_type!r} have not been tried in it"
    kinds = {place_of(name).kind for name in changed}
    if beyond := sorted(kinds & UNDIALABLE_KINDS):
        return f"the vector changes {' and '.join(beyond)}, which it can't apply"
    return ""
