"""Which target a sweep asks: a digest that is cheap enough for any size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import blake3

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["sampled_digest"]

WHOLE_BYTES: Final = 4 << 20
"""Files up to here are read whole."""
PIECE_BYTES: Final = 64 << 10
PIECES: Final = 64
"""Of a longer file, spread evenly; its beginning, a shard's table, and its end are among them."""
PATTERNS: Final = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def sampled_digest(folder: Path) -> str:
    """Digest a checkpoint's files: small ones whole, of shards 4 MiB spread over each.

    Any training changes weights all over a shard, so that another checkpoint has another digest. It
    is no proof against somebody who means to deceive.
    """
    hasher = blake3.blake3()
    paths = {path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(paths):
        size = path.stat().st_size
        hasher.update(f"{path.name}\0{size}\0".encode(errors="surrogateescape"))
        with path.open("rb") as file:
            if size <= WHOLE_BYTES:
                hasher.update(file.read())
                continue
            for piece in range(PIECES):
                file.seek((size - PIECE_BYTES) * piece // (PIECES - 1))
                hasher.update(file.read(PIECE_BYTES))
    return hasher.hexdigest()
