"""Write a stored vector: tensors one at a time into shards, the manifest last.

Every command that makes a vector (extract, transform, import-lora, ...) goes through here. The
folder itself is made whole or not at all by `checkpoint.output.new_folder`.
"""

from __future__ import annotations

import datetime
import math
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from vllm_rvec import __version__
from vllm_rvec.checkpoint.digest import file_digest
from vllm_rvec.checkpoint.output import write_durably
from vllm_rvec.checkpoint.writer import ShardWriter
from vllm_rvec.vector.layout import longest_part_names
from vllm_rvec.vector.manifest import MANIFEST_NAME, StoredFile, TensorEntry

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

    from vllm_rvec.vector.encodings import Encoded
    from vllm_rvec.vector.manifest import Manifest

__all__ = ["TOOL", "VectorWriter", "now", "write_manifest"]

TOOL = f"vllm_rvec {__version__}"
"""What the manifest names as its writer."""

MAX_SHARD_BYTES = 5 << 30
"""Tensors go to one shard as long as they have no more bytes than this in float32."""


class VectorWriter:
    """The shards of a vector under construction; a context manager.

    Args:
        folder: Where they go: an unfinished folder.
        shapes: Every tensor that will be added with its shape, in the order of adding.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.folder = folder
        self.entries: dict[str, TensorEntry] = {}
        self._plans = list(_plan_shards(shapes))
        self._shard: ShardWriter | None = None
        self._shards: list[Path] = []
        self._digests: list[Future[str]] = []
        # Finished shards go to the disk, and are read back for their digest, while the next ones
        # are written.
        self._pool = ThreadPoolExecutor(2, "rvec-shard")
        self._syncs: list[Future[None]] = []

    def __enter__(self) -> VectorWriter:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._shard is not None:
            self._shard.__exit__(exc_type, exc, traceback)
        self._pool.shutdown(cancel_futures=True)

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        encoded: Encoded,
        *,
        squared_norm: float = 0.0,
        base_norm: float | None = None,
        changed: int | None = None,
    ) -> TensorEntry:
        """Write one tensor.

        Args:
            name: The checkpoint's own name, one of those announced.
            shape: The tensor's shape.
            encoded: Its parts, as `encode` prepares them.
            squared_norm: Of the exact tensor: what the encoding's error is relative to.
            base_norm: Frobenius norm of the base donor's tensor, where known.
            changed: Elements of the exact tensor that are not zero, where known.

        Returns:
            Its manifest entry.
        """
        while name not in self._plans[0]:
            self._close_shard()
            self._plans.pop(0)
        for part in encoded.parts:
            slot = self._current().begin(name + part.suffix, part.dtype, part.shape)
            for block in part.blocks:
                slot.append(block)
        entry = TensorEntry(
            shape=shape,
            dtype=encoded.dtype,
            encoding=encoded.encoding,
            scaling=encoded.scaling,
            norm=encoded.squared_norm**0.5,
            base_norm=base_norm,
            changed=changed,
            error=(encoded.squared_error / squared_norm) ** 0.5 if squared_norm else 0.0,
        )
        self.entries[name] = entry
        return entry

    def finish(self) -> dict[str, StoredFile]:
        """Close the last shard, give all their names, and digest them.

        Returns:
            What the manifest says of them.
        """
        self._close_shard()
        for sync in self._syncs:
            sync.result()
        files = {}
        for number, (path, digest) in enumerate(zip(self._shards, self._digests, strict=True), 1):
            name = _shard_name(number, len(self._shards))
            digest.result()  # it reads the file by its present name
            path.rename(self.folder / name)
            size_bytes = (self.folder / name).stat().st_size
            files[name] = StoredFile(size_bytes=size_bytes, blake3=digest.result())
        return files

    def _current(self) -> ShardWriter:
        if self._shard is None:
            path = self.folder / f"{len(self._shards):05d}.part"
            shapes = [
                (part, shape)
                for name, shape in self._plans[0].items()
                for part in longest_part_names(name)
            ]
            self._shard = ShardWriter(path, shapes, {"format": "pt"})
        return self._shard

    def _close_shard(self) -> None:
        if self._shard is None:  # all of its tensors are zero
            return
        self._shard.finish(is_durable=False)
        self._shards.append(self._shard.path)
        self._syncs.append(self._pool.submit(_sync_and_close, self._shard))
        self._digests.append(self._pool.submit(file_digest, self._shard.path))
        self._shard = None


def _sync_and_close(shard: ShardWriter) -> None:
    with shard:
        shard.sync()


def _plan_shards(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    plan: dict[str, tuple[int, ...]] = {}
    size_bytes = 0
    for name, shape in shapes.items():
        tensor_bytes = math.prod(shape) * 4
        if plan and size_bytes + tensor_bytes > MAX_SHARD_BYTES:
            yield plan
            plan, size_bytes = {}, 0
        plan[name] = shape
        size_bytes += tensor_bytes
    yield plan


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `vector.json` with its digest, the last file of a vector."""
    text = manifest.sealed().model_dump_json(indent=1)
    write_durably(folder / MANIFEST_NAME, text.encode())


def now() -> str:
    """Return the date and time for a manifest: ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _shard_name(number: int, count: int) -> str:
    return "vector.safetensors" if count == 1 else f"vector-{number:05d}-of-{count:05d}.safetensors"
