"""Read a stored vector: its manifest at once, its tensors one at a time, memory-mapped."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import psutil

from vllm_rvec.checkpoint.stamps import Stamp
from vllm_rvec.checkpoint.table import read_header
from vllm_rvec.errors import CheckpointError, VectorCorruptError, VectorFormatError
from vllm_rvec.vector.layout import part_names, part_problems
from vllm_rvec.vector.manifest import Manifest, is_own

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from vllm_rvec.checkpoint.reader import CheckpointReader
    from vllm_rvec.checkpoint.table import TensorTable
    from vllm_rvec.vector.stored import StoredTensor

__all__ = ["VectorReader"]

COPY_AGAIN = "copy or download the whole folder again"


class VectorReader:
    """A stored vector, opened: sizes and headers are checked against the manifest, no data is read.

    Args:
        folder: The vector's folder.

    Raises:
        VectorNotFoundError: There is no such folder.
        VectorFormatError: It is no vector, or one that this version does not read.
        VectorCorruptError: Its shards don't hold what its manifest says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self._check_files()
        self._stamps = self._take_stamps()
        self.table = self._read_table()
        self._check_parts()
        self._reader: CheckpointReader | None = None

    @property
    def shards(self) -> list[Path]:
        """The files that hold the tensors' parts, sorted."""
        return [self.folder / name for name in sorted(self.manifest.files)]

    def tensor(self, name: str) -> torch.Tensor | None:
        """Return one tensor of v, on the CPU in its entry's dtype; None where it is all zero.

        A dense tensor is a view of the mapped file; others are decoded anew at each call, and take
        the memory that the manifest's shape says. Compare it with a target's before.

        Raises:
            KeyError: The vector has no such tensor.
            VectorFormatError: Decoded, it would take more memory than this machine has.
            VectorCorruptError: Its shard can't be read, or its parts contradict each other.
        """
        entry = self.manifest.tensors[name]
        if entry.encoding not in {"zero", "dense"}:
            self._check_memory(name, entry.elements)
        stored = self.stored(name)
        return None if stored is None else stored.read(0, stored.elements).view(entry.shape)

    def stored(self, name: str) -> StoredTensor | None:
        """Return one tensor of v as it is stored; None where it is all zero. Nothing is read yet.

        Raises:
            KeyError: The vector has no such tensor.
            VectorCorruptError: Its shard can't be read.
        """
        # Here and not above: whoever looks at manifests only should not wait for torch.
        from vllm_rvec.vector.stored import open_stored  # noqa: PLC0415

        entry = self.manifest.tensors[name]
        if entry.encoding == "zero":
            return None
        parts = {part: self.part(part) for part in self._parts_of(name)}
        stored = open_stored(entry, name, parts)
        stored.check = partial(self.check_unchanged, name)
        return stored

    def part(self, part: str) -> torch.Tensor:
        """Return one part as it is stored: a view of the mapped file.

        Args:
            part: Its name in `table`.

        Raises:
            VectorCorruptError: Its shard can't be read.
        """
        from vllm_rvec.checkpoint.reader import CheckpointReader  # noqa: PLC0415 - as above

        if self._reader is None:
            self._reader = CheckpointReader(self.folder, self.table, self._stamps)
        try:
            return self._reader.tensor(part)
        except CheckpointError as exc:
            raise _corrupt(exc) from exc

    def check_unchanged(self, name: str | None = None) -> None:
        """Make sure that what was read came from files that are still as they were.

        Args:
            name: A tensor; all that were read where None.

        Raises:
            VectorCorruptError: A shard was written to, cut short or replaced since it was opened.
        """
        try:
            if self._reader is not None:
                parts = None if name is None else self._parts_of(name)
                self._reader.check_unchanged(parts)
        except CheckpointError as exc:
            raise _corrupt(exc) from exc

    def release(self, name: str) -> None:
        """Let go of the memory that holds a tensor's pages, as `CheckpointReader.release`."""
        if self._reader is not None:
            for part in self._parts_of(name):
                self._reader.release(part)

    def _parts_of(self, name: str) -> tuple[str, ...]:
        return part_names(name, self.manifest.tensors[name], self.table)

    def _check_memory(self, name: str, elements: int) -> None:
        has_bytes = psutil.virtual_memory().total
        if elements * 4 > has_bytes:
            raise VectorFormatError(
                f"tensor {name!r} of {self.folder} can't be decoded",
                why=f"its shape makes {elements * 4 / 1e9:,.0f} GB, this machine has "
                f"{has_bytes / 1e9:,.0f} GB",
                fix="check where the vector comes from, or use a larger machine",
                path=self.folder,
                tensor_name=name,
            )

    def _check_files(self) -> None:
        problems = [problem for shard in self.shards if (problem := self._file_problem(shard))]
        if problems:
            raise VectorCorruptError(
                f"the files of {self.folder} are not those that its manifest names",
                problems=problems,
                fix=COPY_AGAIN,
                path=self.folder,
            )
        found = {path.name for path in self.folder.glob("*.safetensors")}
        if stray := sorted(found - self.manifest.files.keys()):
            raise VectorFormatError(
                f"{self.folder} holds shards that its manifest does not name",
                problems=stray,
                why="files of two vectors were mixed",
                fix=COPY_AGAIN,
                path=self.folder,
            )

    def _take_stamps(self) -> dict[Path, Stamp]:
        """Note how the shards are now, before anything is read of them."""
        try:
            return {shard: Stamp.of(shard) for shard in self.shards}
        except OSError as exc:  # gone since a moment ago
            raise VectorCorruptError(
                f"a shard of {self.folder} can't be read", why=str(exc), fix=COPY_AGAIN
            ) from exc

    def _file_problem(self, shard: Path) -> str:
        try:
            if not shard.is_file():
                return f"{shard.name}: missing, or no regular file"
            if not is_own(shard, self.folder):
                return f"{shard.name}: a link out of the folder"
            size = shard.stat().st_size
        except (OSError, RuntimeError) as exc:  # no permission; a loop of links
            return f"{shard.name}: {exc}"
        expected = self.manifest.files[shard.name].size_bytes
        return "" if size == expected else f"{shard.name}: {size} bytes, not {expected}"

    def _read_table(self) -> TensorTable:
        table: TensorTable = {}
        for shard in self.shards:
            try:
                header = read_header(shard)
            except CheckpointError as exc:
                if isinstance(exc.__cause__, PermissionError):  # nothing says that it is damaged
                    raise VectorFormatError(
                        exc.what, why=exc.why, fix=exc.fix, path=exc.path
                    ) from exc
                raise _corrupt(exc) from exc
            if twice := sorted(table.keys() & header.keys()):
                raise VectorCorruptError(
                    f"{shard} holds tensors that another shard holds too",
                    problems=twice,
                    fix=COPY_AGAIN,
                    path=shard,
                    tensor_name=twice[0],
                )
            table |= header
            # A tensor has two parts at most. Before the next header is read: this much is too much.
            if len(table) > 2 * len(self.manifest.tensors):
                raise _unnamed(self.folder, shard, len(table))
        return table

    def _check_parts(self) -> None:
        tensors = self.manifest.tensors
        problems = [
            problem
            for name, entry in sorted(tensors.items())
            for problem in part_problems(name, entry, self.table)
        ]
        if problems:
            raise VectorCorruptError(
                f"the shards of {self.folder} don't hold what its manifest says",
                problems=problems,
                fix=COPY_AGAIN,
                path=self.folder,
                tensor_name=problems[0].partition(":")[0],
            )
        named = {part for n, entry in tensors.items() for part in part_names(n, entry, self.table)}
        if unnamed := sorted(self.table.keys() - named):
            raise VectorFormatError(
                f"{self.folder} holds tensors that its manifest does not name",
                problems=unnamed,
                why="shards of two vectors were mixed, or a file was edited",
                fix=COPY_AGAIN,
                path=self.folder,
                tensor_name=unnamed[0],
            )


def _unnamed(folder: Path, shard: Path, count: int) -> VectorFormatError:
    return VectorFormatError(
        f"{folder} holds tensors that its manifest does not name",
        why=f"up to {shard.name} its shards hold {count}, more than all of the manifest's have",
        fix=COPY_AGAIN,
        path=shard,
    )


def _corrupt(exc: CheckpointError) -> VectorCorruptError:
    return VectorCorruptError(
        exc.what, why=exc.why, fix=exc.fix, path=exc.path, tensor_name=exc.tensor_name
    )
