"""A vector that another one is derived from: checked as a whole, then read tensor by tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_rvec.checkpoint.digest import file_digest
from vllm_rvec.checkpoint.fetch import Located
from vllm_rvec.vector.layout import part_names
from vllm_rvec.vector.manifest import MANIFEST_NAME
from vllm_rvec.vector.reader import VectorReader
from vllm_rvec.vector.verification import verify

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from vllm_rvec.vector.manifest import Manifest, TensorEntry

__all__ = ["VectorInput"]


class VectorInput:
    """One stored vector, as an input.

    Args:
        vector: Its folder, or where it was found.

    Raises:
        VectorFormatError: It is no vector that this version reads.
        VectorCorruptError: Its shards don't hold what its manifest says.
    """

    def __init__(self, vector: Path | Located) -> None:
        self.located = Located.of(vector)
        self.reader = VectorReader(self.located.folder)
        self.digest = file_digest(self.located.folder / MANIFEST_NAME)
        """blake3 of its manifest."""

    @property
    def manifest(self) -> Manifest:
        """Its manifest."""
        return self.reader.manifest

    @property
    def id(self) -> str:
        """What it is called: a Hub id, with its commit, or the folder's own name."""
        revision = self.located.revision
        return self.located.id if revision is None else f"{self.located.id}@{revision}"

    def entry(self, name: str) -> TensorEntry | None:
        """Return what its manifest says of a tensor; None where it has none of that name."""
        return self.manifest.tensors.get(name)

    def tensor(self, name: str) -> torch.Tensor | None:
        """Return one tensor in its entry's dtype; None where it is all zero, or there is none.

        Raises:
            VectorCorruptError: It can't be read.
        """
        return None if self.entry(name) is None else self.reader.tensor(name)

    def release(self, name: str) -> None:
        """Let go of the memory that holds a tensor's pages."""
        if self.entry(name) is not None:
            self.reader.release(name)

    def check_data(self) -> None:
        """Read all of its data once, unless an earlier pass found these files sound.

        What is derived gets digests of its own: damage that is not found here would never be.

        Raises:
            VectorCorruptError: It is not what was written, or holds NaN or infinity.
        """
        verify(self.reader)

    def names_in_file_order(self) -> list[str]:
        """Return the names of its tensors in the order in which reading them is sequential."""
        table = self.reader.table

        def place(name: str) -> tuple[str, int, str]:
            parts = part_names(name, self.manifest.tensors[name], table)
            first = min((table[part].shard.name, table[part].offset_bytes) for part in parts)
            return first[0], first[1], name

        stored = [name for name, entry in self.manifest.tensors.items() if entry.encoding != "zero"]
        zero = self.manifest.tensors.keys() - set(stored)
        return [*sorted(stored, key=place), *sorted(zero)]
