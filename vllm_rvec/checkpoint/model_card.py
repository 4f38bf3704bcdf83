"""What a checkpoint's README.md says of it in its YAML front matter. Imports no torch.

Others wrote it: what can't be read says nothing, and is no error.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

from vllm_rvec.checkpoint.companions import MODEL_CARD
from vllm_rvec.errors import printable

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["license_of", "read_front_matter"]

MAX_FRONT_MATTER_CHARACTERS = 1 << 16
"""What is looked for stands at the beginning; no more of a card is read."""


def read_front_matter(folder: Path) -> dict[Any, Any]:
    """Read the YAML between the first two lines of dashes of a folder's model card.

    Returns:
        Nothing where there is no card, or none that can be read.
    """
    try:
        found = yaml.safe_load(_front_matter(folder / MODEL_CARD))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def license_of(folder: Path) -> str | None:
    """Return the `license` of a checkpoint's model card; None where it names none."""
    found = read_front_matter(folder).get("license")
    return printable(found.strip()) or None if isinstance(found, str) else None


def _front_matter(card: Path) -> str:
    if not card.is_file():  # before it is opened: a pipe would have the reader wait for a writer
        return ""
    with card.open(encoding="utf-8") as file:
        text = file.read(MAX_FRONT_MATTER_CHARACTERS)
    matched = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    return matched[1] if matched else ""
