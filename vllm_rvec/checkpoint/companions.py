"""The small files of a checkpoint beside its weights: configuration, tokenizer, licence, code.

Who writes a checkpoint made from another carries them over. What is not known to belong to a
checkpoint that is loaded (optimizer states, pickles, logs, weights in other formats) stays behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_rvec.checkpoint.table import INDEX_NAME

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

__all__ = ["MODEL_CARD", "Companions", "find_companions"]

SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
"""Configuration, chat templates, vocabularies and merges, sentencepiece, the model's own code."""

LEGAL_NAMES = ("license", "licence", "notice", "copying", "use_policy")
"""What files that must travel with the weights begin with, in small letters."""

TRAINING_NAMES = ("trainer_state", "training_args", "optimizer", "scheduler", "all_results")
"""What files that tell of the training begin with."""

MODEL_CARD = "README.md"

MAX_COMPANION_BYTES = 256 << 20
"""The largest tokenizers have some 40 MB."""


@dataclass(frozen=True, slots=True)
class Companions:
    """A checkpoint folder's content but for shards and model card, sorted by name."""

    carried: tuple[Path, ...]
    """Files that a copy of the checkpoint needs, its index among them."""
    left_behind: tuple[str, ...]
    """Names of everything else."""


def find_companions(folder: Path, shards: Collection[Path]) -> Companions:
    """Sort a checkpoint folder's files, links to files included.

    Args:
        folder: The checkpoint's folder.
        shards: Its files of weights.
    """
    others = [
        path
        for path in sorted(folder.iterdir())
        if path not in shards and path.name != MODEL_CARD and path.name[0] != "."
    ]
    carried = tuple(path for path in others if _is_carried(path))
    left = tuple(path.name for path in others if path not in carried)
    return Companions(carried, left)


def _is_carried(path: Path) -> bool:
    name = path.name.lower()
    if not path.is_file() or path.stat().st_size > MAX_COMPANION_BYTES:
        return False
    if name.startswith(LEGAL_NAMES) or path.name == INDEX_NAME:
        return True
    is_other_index = name.endswith(".index.json")
    return name.endswith(SUFFIXES) and not is_other_index and not name.startswith(TRAINING_NAMES)
