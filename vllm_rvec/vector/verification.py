"""Check every byte of a vector once, and remember that it is sound.

One pass over each file gives its digest and tells whether the numbers in it are ones that can be
added to a model: a NaN answers with noise, far from its cause. The pass is a good part of a load;
so the verdict is kept in the user's cache folder, bound to the manifest's digest and to path, size,
modification time and inode of every file. A cache that can't be written costs the pass again,
nothing else.

Imports no torch, and reads instead of mapping: a file that is cut off meanwhile is an error here,
not the end of the process.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import blake3
import numpy as np

from vllm_rvec.checkpoint.cache import cache_folder
from vllm_rvec.checkpoint.stamps import Stamp
from vllm_rvec.errors import VectorCorruptError
from vllm_rvec.vector.layout import LORA_A, VALUES, part_names
from vllm_rvec.vector.part_checks import PIECE_ALIGNMENT, PartFacts, part_suffix, tensor_problems

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from io import FileIO
    from pathlib import Path

    from vllm_rvec.checkpoint.table import TensorInfo
    from vllm_rvec.vector.reader import VectorReader

__all__ = ["Problem", "Verification", "examine", "verify"]

CHECKS_VERSION = 1
"""Raised when `examine` learns to see more: verdicts from before don't count then."""

PIECE_BYTES = 1 << 20
"""Read at a time: stays in a core's cache from the disk's copy over the digest to the check."""

REPORT_BYTES = 1 << 24
"""Progress is told about this often."""

MAX_THREADS = 8


class Problem(NamedTuple):
    """One thing that is wrong with a vector's data."""

    file: str
    """The shard's name."""
    tensor_name: str | None
    """The tensor, where it is one."""
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.where_and_what}"

    @property
    def where_and_what(self) -> str:
        """The tensor and what is wrong with it, without the file."""
        return self.text if self.tensor_name is None else f"{self.tensor_name}: {self.text}"


@dataclass(frozen=True, slots=True)
class Verification:
    """What came of looking at a vector's data."""

    folder: Path
    """The vector's."""
    size_bytes: Mapping[str, int]
    """Every shard's size, by name."""
    problems: tuple[Problem, ...] = ()
    """All that is wrong; none if the vector is sound."""
    was_remembered: bool = False
    """Whether an earlier verdict was taken, and no data read."""

    def raise_for_problems(self) -> None:
        """Do nothing for a sound vector.

        Raises:
            VectorCorruptError: It is not; names every file and tensor concerned.
        """
        if not self.problems:
            return
        tensors = [found.tensor_name for found in self.problems if found.tensor_name]
        raise VectorCorruptError(
            f"the vector {self.folder} is damaged: {len(self.problems)} problems",
            problems=[str(problem) for problem in self.problems],
            why="its data is not what was written, or can't be added to a model: one such weight "
            "spoils every answer",
            fix="copy or download the whole folder again, or make it again from sound donors",
            path=self.folder / self.problems[0].file,
            tensor_name=tensors[0] if tensors else None,
        )


def verify(
    vector: VectorReader,
    *,
    remembered: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Make sure that a vector's data is as it was written, and fit to be added.

    Args:
        vector: Opened, and so with sound sizes and headers.
        remembered: Whether an earlier verdict on the same files will do.
        on_progress: Called with the bytes done and the bytes in all, from several threads, one at
            a time.

    Returns:
        The verdict, without problems. It is remembered.

    Raises:
        VectorCorruptError: A file has another digest than the manifest says or can't be read, or a
            tensor holds NaN or infinity, can overflow, or contradicts itself; all of it at once.
    """
    if remembered and _read_stamp(vector.folder) == _identity(vector):
        return Verification(vector.folder, _sizes(vector), was_remembered=True)
    found = examine(vector, on_progress=on_progress)
    found.raise_for_problems()
    return found


def examine(
    vector: VectorReader, *, on_progress: Callable[[int, int], None] | None = None
) -> Verification:
    """Read all of a vector's data, and say what is wrong with it; as `verify`, but no error."""
    identity = _identity(vector)  # before the data: what is written meanwhile is another file
    sizes = _sizes(vector)
    with _Pass(vector, _Progress(sum(sizes.values()), on_progress)) as files:
        problems = tuple(files.problems())
    if not problems and identity is not None:
        _write_stamp(vector.folder, identity)
    return Verification(vector.folder, sizes, problems)


class _StoppedError(Exception):
    """Another thread has failed: whoever waits knows why."""


class _Progress:
    """Adds up what several threads have done."""

    def __init__(self, total: int, report: Callable[[int, int], None] | None) -> None:
        self._total, self._report = total, report
        self._done = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._report is not None:
                self._report(self._done, self._total)


class _Pass:
    """One pass over all files, each by a thread; a context manager that ends its threads early."""

    def __init__(self, vector: VectorReader, progress: _Progress) -> None:
        self._vector = vector
        self._progress = progress
        self._pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), "rvec-verify")
        self._is_over = threading.Event()

    def __enter__(self) -> _Pass:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._pool.shutdown(cancel_futures=True)

    def problems(self) -> Iterator[Problem]:
        """Say what is wrong with the files, and then with the tensors in them."""
        by_shard: dict[Path, dict[str, TensorInfo]] = defaultdict(dict)
        for part, info in self._vector.table.items():
            by_shard[info.shard][part] = info
        futures = {
            shard: self._pool.submit(self._read, shard, by_shard[shard])
            for shard in self._vector.shards
        }
        facts: dict[str, PartFacts] = {}
        for shard, future in futures.items():
            try:
                digest, found = future.result()
            except OSError as exc:
                yield Problem(shard.name, None, exc.strerror or str(exc))
                continue
            facts |= found
            if digest != self._vector.manifest.files[shard.name].blake3:
                yield Problem(
                    shard.name, None, "its bytes are not those that were written (blake3)"
                )
        yield from _tensor_problems(self._vector, facts)

    def _read(
        self, shard: Path, parts: Mapping[str, TensorInfo]
    ) -> tuple[str, dict[str, PartFacts]]:
        """Return a file's digest, and what its bytes tell of the parts in it."""
        hasher = blake3.blake3()
        facts: dict[str, PartFacts] = {}
        size_bytes = self._vector.manifest.files[shard.name].size_bytes
        buffer = np.empty(
            min(PIECE_BYTES, -(-size_bytes // PIECE_ALIGNMENT) * PIECE_ALIGNMENT), "u1"
        )
        with shard.open("rb", buffering=0) as file:
            done = reported = 0
            for part, length in _segments(parts, size_bytes):
                fact = PartFacts(part_suffix(part), parts[part].dtype) if part else None
                for piece in _pieces(file, buffer, length):
                    hasher.update(piece.data)
                    if fact is not None:
                        fact.add(piece)
                    done += piece.size
                    if done - reported >= REPORT_BYTES or done == size_bytes:
                        self._report(done - reported)
                        reported = done
                if fact is not None:
                    facts[part] = fact
        return hasher.hexdigest(), facts

    def _report(self, count: int) -> None:
        if self._is_over.is_set():
            raise _StoppedError
        self._progress.add(count)


def _segments(parts: Mapping[str, TensorInfo], size_bytes: int) -> Iterator[tuple[str, int]]:
    """Cut a file into its header, with no name, and the parts, which leave no holes."""
    ordered = sorted(parts.items(), key=lambda item: (item[1].offset_bytes, item[1].size_bytes))
    yield "", ordered[0][1].offset_bytes if ordered else size_bytes
    for part, info in ordered:
        yield part, info.size_bytes


def _pieces(file: FileIO, buffer: np.ndarray, length: int) -> Iterator[np.ndarray]:
    while length:
        piece = buffer[: min(length, buffer.size)]
        got = 0
        while got < piece.size:
            if not (count := file.readinto(piece[got:].data)):
                raise OSError("it was cut off while it was read")
            got += count
        yield piece
        length -= piece.size


def _tensor_problems(vector: VectorReader, facts: Mapping[str, PartFacts]) -> Iterator[Problem]:
    for name, entry in vector.manifest.tensors.items():
        parts = part_names(name, entry, vector.table)
        if not parts or not all(part in facts for part in parts):
            continue  # zero, or of a file that could not be read
        infos = {part.removeprefix(name): vector.table[part] for part in parts}
        counted = infos.get(VALUES) or infos.get(LORA_A)
        count = counted.shape[0] if counted else 0
        found = {part.removeprefix(name): facts[part] for part in parts}
        shard = vector.table[parts[0]].shard.name
        yield from (Problem(shard, name, text) for text in tensor_problems(entry, found, count))


def _sizes(vector: VectorReader) -> dict[str, int]:
    return {name: file.size_bytes for name, file in sorted(vector.manifest.files.items())}


def _identity(vector: VectorReader) -> dict[str, object] | None:
    """Tell a vector's files from any others, without reading them."""
    try:
        files = [[shard.name, *Stamp.of(shard)] for shard in vector.shards]
    except OSError:
        return None
    return {"checks": CHECKS_VERSION, "manifest": vector.manifest.digest, "files": files}


def _stamp_path(folder: Path) -> Path | None:
    cache = cache_folder()
    # fsencode: a folder's name may be no UTF-8.
    key = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return None if cache is None else cache / "verified" / f"{key}.json"


def _read_stamp(folder: Path) -> object:
    if (stamp := _stamp_path(folder)) is None:
        return ()
    try:
        return json.loads(stamp.read_bytes())
    except (OSError, ValueError):
        return ()


def _write_stamp(folder: Path, identity: dict[str, object]) -> None:
    if (stamp := _stamp_path(folder)) is None:
        return
    # Several processes may write at once: each writes a file of its own and renames it.
    own = stamp.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    with suppress(OSError):
        stamp.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(json.dumps(identity))
        own.replace(stamp)
