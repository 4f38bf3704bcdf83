"""Read a stored vector: its manifest at once, its tensors one at a time, memory-mapped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_rvec.checkpoint.table import read_table
from vllm_rvec.errors import CheckpointError, VectorCorruptError, VectorFormatError
from vllm_rvec.vector.manifest import Manifest

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from vllm_rvec.checkpoint.reader import CheckpointReader
    from vllm_rvec.checkpoint.table import TensorTable

__all__ = ["VectorReader"]


class VectorReader:
    """A stored vector, opened: headers are checked against the manifest, no data is read.

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
        self.table = self._read_table()
        self._check_shards()
        self._reader: CheckpointReader | None = None

    @property
    def shards(self) -> list[Path]:
        """The files that hold the dense tensors, sorted."""
        return sorted({info.shard for info in self.table.values()})

    def tensor(self, name: str) -> torch.Tensor | None:
        """Return one tensor of v, on the CPU in its stored dtype; None where it is all zero.

        Raises:
            KeyError: The vector has no such tensor.
            VectorCorruptError: Its shard can't be read.
        """
        if self.manifest.tensors[name].encoding == "zero":
            return None
        try:
            return self._tensors().tensor(name)
        except CheckpointError as exc:
            raise _corrupt(exc) from exc

    def _tensors(self) -> CheckpointReader:
        # Here and not above: whoever looks at manifests only should not wait for torch.
        from vllm_rvec.checkpoint.reader import CheckpointReader  # noqa: PLC0415

        if self._reader is None:
            self._reader = CheckpointReader(self.folder, self.table)
        return self._reader

    def _dense_names(self) -> set[str]:
        return {n for n, entry in self.manifest.tensors.items() if entry.encoding == "dense"}

    def _read_table(self) -> TensorTable:
        if not self._dense_names():
            return {}
        try:
            return read_table(self.folder)
        except CheckpointError as exc:
            raise _corrupt(exc) from exc

    def _check_shards(self) -> None:
        dense, stored = self._dense_names(), set(self.table)
        problems = [f"{name}: in the manifest, in no shard" for name in sorted(dense - stored)]
        problems += [self._difference(name) for name in sorted(dense & stored)]
        if problems := [problem for problem in problems if problem]:
            raise VectorCorruptError(
                f"the shards of {self.folder} don't hold what its manifest says",
                problems=problems,
                fix="copy or download the whole folder again",
                path=self.folder,
            )
        if unnamed := sorted(stored - dense):
            raise VectorFormatError(
                f"{self.folder} holds tensors that its manifest does not name as dense",
                problems=unnamed,
                why="shards of two vectors were mixed, or a file was edited",
                fix="copy or download the whole folder again",
                path=self.folder,
            )

    def _difference(self, name: str) -> str:
        entry, info = self.manifest.tensors[name], self.table[name]
        if entry.shape != info.shape:
            return f"{name}: shape {list(info.shape)}, the manifest says {list(entry.shape)}"
        if entry.dtype != info.dtype:
            return f"{name}: dtype {info.dtype}, the manifest says {entry.dtype}"
        return ""


def _corrupt(exc: CheckpointError) -> VectorCorruptError:
    return VectorCorruptError(
        exc.what, why=exc.why, fix=exc.fix, path=exc.path, tensor_name=exc.tensor_name
    )
