"""vllm_rvec.checkpoint.model_card: what a README.md's front matter says."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from vllm_rvec.checkpoint.model_card import license_of, read_front_matter

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\n---\n# A\n", "mit"),
        ("---\r\ntags:\r\n- a\r\nlicense: 'apache-2.0'\r\n---\r\n", "apache-2.0"),
        ("---\nlicense: [mit, gpl]\n---\n", None),
        ("---\nlicense: ''\n---\n", None),
        ("---\ntags: [a]\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("---\nlicense: mit\n", None),
        ("---\nlicense: mit\nx: [\n---\n", None),
        ('---\nlicense: "\\ud800"\n---\n', "\\ud800"),
        ("---\n" + "#" * (1 << 16) + "\nlicense: mit\n---\n", None),
    ],
)
def test_the_licence_is_that_of_the_front_matter(
    tmp_path: Path, text: str, found: str | None
) -> None:
    """Only text counts, and only where it is looked for; half a character is escaped."""
    (tmp_path / "README.md").write_bytes(text.encode())
    assert license_of(tmp_path) == found


def test_what_is_no_card_says_nothing(tmp_path: Path) -> None:
    """Nothing there, bytes that are no text, a pipe that nobody writes into."""
    card = tmp_path / "README.md"
    assert read_front_matter(tmp_path) == {}
    card.write_bytes(b"---\nlicense: \xff\n---\n")
    assert read_front_matter(tmp_path) == {}
    card.unlink()
    os.mkfifo(card)
    assert read_front_matter(tmp_path) == {}
