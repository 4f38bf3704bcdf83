"""Check once that a vector's values are finite, and remember that they are.

A vector with a NaN answers with noise, far from the cause. Looking costs one pass over the data,
which is a good part of a load; so the verdict is kept in the user's cache folder, bound to the
identity of the files (path, size, modification time, inode), and a later load only compares those.
A cache that can't be written costs the pass again, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_rvec.arithmetic import is_finite
from vllm_rvec.errors import VectorCorruptError

if TYPE_CHECKING:
    from vllm_rvec.vector.reader import VectorReader

__all__ = ["cache_folder", "verify_finite"]


def cache_folder() -> Path | None:
    """Return where this package keeps what can be made again: `$XDG_CACHE_HOME/vllm_rvec`.

    None for a user without a home, as a container's random one.
    """
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "vllm_rvec"
    try:
        return Path.home() / ".cache" / "vllm_rvec"
    except RuntimeError:
        return None


def verify_finite(vector: VectorReader) -> bool:
    """Make sure that every element of a vector is a finite number.

    Returns:
        Whether the data was read; False if the verdict was remembered.

    Raises:
        VectorCorruptError: It holds NaN or infinity; names every such tensor.
    """
    stamp, identity = _stamp_path(vector.folder), _identity(vector)
    if _read_stamp(stamp) == identity:
        return False
    bad = [name for name in vector.table if not _is_finite(vector, name)]
    if bad:
        raise VectorCorruptError(
            f"the vector {vector.folder} holds NaN or infinity in {len(bad)} tensors",
            problems=bad,
            why="one such weight spoils every answer of the model",
            fix="extract the vector again from donors that are sound, or copy it again",
            path=vector.folder,
            tensor_name=bad[0],
        )
    _write_stamp(stamp, identity)
    return True


def _is_finite(vector: VectorReader, name: str) -> bool:
    tensor = vector.tensor(name)
    return tensor is None or is_finite(tensor)


def _identity(vector: VectorReader) -> list[list[object]]:
    stats = [(shard, shard.stat()) for shard in vector.shards]
    return [[s.name, st.st_size, st.st_mtime_ns, st.st_ino] for s, st in stats]


def _stamp_path(folder: Path) -> Path | None:
    cache = cache_folder()
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    return None if cache is None else cache / "finite" / f"{key}.json"


def _read_stamp(stamp: Path | None) -> object:
    if stamp is None:
        return None
    try:
        return json.loads(stamp.read_bytes())
    except (OSError, ValueError):
        return None


def _write_stamp(stamp: Path | None, identity: list[list[object]]) -> None:
    if stamp is None:
        return
    # Several ranks may write at once: each writes a file of its own and renames it.
    own = stamp.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        stamp.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(json.dumps(identity))
        own.replace(stamp)
