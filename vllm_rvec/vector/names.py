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
    "is_output_head",
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

LANGUAGE_PARTS = ("language_model.", "text_model.")
"""What a multimodal checkpoint has before the names of its language model."""


def plain_name(name: str) -> str:
    """Return a name without `model.` and `language_model.`: what two exports have in common.

    >>> plain_name("model.layers.0.mlp.up_proj.weight"), plain_name("norm.weight")
    ('layers.0.mlp.up_proj.weight', 'norm.weight')
    >>> plain_name("language_model.model.norm.weight"), plain_name("model.text_model.norm.weight")
    ('norm.weight', 'norm.weight')
    """
    plain = name.removeprefix(PREFIX)
    for part in LANGUAGE_PARTS:
        if plain.startswith(part):
            return plain.removeprefix(part).removeprefix(PREFIX)
    return plain


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


def is_output_head(name: str) -> bool:
    """Tell whether a tensor is the output head, also that of a multimodal model."""
    return plain_name(name) == OUTPUT_HEAD


def is_vocabulary(name: str) -> bool:
    """Tell whether a tensor has a row for each token."""
    return is_output_head(name) or name.endswith(EMBEDDING_SUFFIXES)
