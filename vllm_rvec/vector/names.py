"""What the names of a checkpoint's tensors tell. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "DERIVED_SUFFIXES",
    "OUTPUT_HEAD",
    "by_plain_name",
    "embedding_among",
    "is_vocabulary",
    "plain_name",
]

DERIVED_SUFFIXES = (
    "rotary_emb.inv_freq",
    "rotary_pos_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
)
"""Buffers that old checkpoints carry though every engine computes them itself."""

OUTPUT_HEAD = "lm_head.weight"
EMBEDDING_SUFFIXES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")

PREFIX = "model."
"""What a causal language model's checkpoint has before the names of its bare model's."""


def plain_name(name: str) -> str:
    """Return a name without `model.`: what two exports of one model have in common.

    >>> plain_name("model.layers.0.mlp.up_proj.weight"), plain_name("norm.weight")
    ('layers.0.mlp.up_proj.weight', 'norm.weight')
    """
    return name.removeprefix(PREFIX)


def by_plain_name(names: Iterable[str]) -> Mapping[str, str]:
    """Map plain names to a checkpoint's own.

    Where two of its names have one plain name, each stands for itself.
    """
    own = list(names)
    plain = {plain_name(name): name for name in own}
    return plain if len(plain) == len(own) else {name: name for name in own}


def embedding_among(names: Iterable[str]) -> str | None:
    """Find the token embedding; None where there is none, or more than one."""
    found = [name for name in names if name.endswith(EMBEDDING_SUFFIXES)]
    return found[0] if len(found) == 1 else None


def is_vocabulary(name: str) -> bool:
    """Tell whether a tensor has a row for each token."""
    return plain_name(name) == OUTPUT_HEAD or name.endswith(EMBEDDING_SUFFIXES)
