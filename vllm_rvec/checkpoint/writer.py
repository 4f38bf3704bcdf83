"""Write safetensors files block by block, in memory that does not grow with the file.

The safetensors library takes a whole file's tensors at once. This writer leaves room for the
header, appends the data, and fills the header in at the end, padded with spaces as the format
allows (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_rvec.checkpoint.dtypes import DTYPE_NAMES
from vllm_rvec.checkpoint.table import LENGTH_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import BinaryIO

__all__ = ["ShardWriter", "Slot", "header_room"]

HEADER_ALIGNMENT_BYTES = 8
ENTRY_BYTES = 130
"""More than a header's entry takes beside its name and shape: keys, dtype, two offsets."""


def header_room(shapes: Iterable[tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> int:
    """Return an upper bound for the size of a header that holds these tensors."""
    named = sum(len(json.dumps(pair)) + ENTRY_BYTES for pair in shapes)
    room = named + len(json.dumps({"__metadata__": dict(metadata)}))
    return room + -room % HEADER_ALIGNMENT_BYTES


@dataclass(slots=True)
class Slot:
    """The room of one tensor in a file under construction."""

    descriptor: int
    position: int
    """Where in the file the next block goes."""
    end: int
    """Where the tensor's data ends."""

    @property
    def is_full(self) -> bool:
        """Whether all data is there."""
        return self.position == self.end

    def append(self, block: torch.Tensor) -> None:
        """Write the tensor's next block, in its dtype."""
        if block.numel() == 0:  # its strides may be anything
            return
        data = block.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        if self.position + len(data) > self.end:
            raise RuntimeError("more data than was announced for a tensor")
        while data:
            count = os.pwrite(self.descriptor, data, self.position)
            self.position += count
            data = data[count:]


class ShardWriter:
    """One safetensors file under construction; a context manager.

    The file is complete only after `finish`; left without it, the file has no valid header and
    no reader takes it.

    Args:
        path: The file to create. It must not exist.
        shapes: Every tensor that may be written, with its shape: fixes the room for the header.
        metadata: Text pairs for the header's `__metadata__`.
    """

    def __init__(
        self,
        path: Path,
        shapes: Iterable[tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ) -> None:
        self.path = path
        self._room = header_room(shapes, metadata)
        self._header: dict[str, object] = {"__metadata__": dict(metadata)}
        self._end = 0
        self._slots: list[Slot] = []
        self._file: BinaryIO = path.open("xb")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor.

        Args:
            name: One of the names announced to the constructor.
            tensor: On the CPU, of any dtype that safetensors has.
        """
        self.begin(name, tensor.dtype, tuple(tensor.shape)).append(tensor)

    def begin(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Slot:
        """Make room for a tensor whose data follows in blocks.

        Returns:
            The room. Several may be filled at a time, each by a thread of its own.
        """
        start, self._end = self._end, self._end + math.prod(shape) * dtype.itemsize
        self._header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, self._end],
        }
        data_start = LENGTH_BYTES + self._room
        slot = Slot(self._file.fileno(), data_start + start, data_start + self._end)
        self._slots.append(slot)
        return slot

    def finish(self, *, is_durable: bool = True) -> None:
        """Write the header, and wait until the disk has the file unless told otherwise."""
        if not all(slot.is_full for slot in self._slots):
            raise RuntimeError(f"a tensor of {self.path.name} was announced with another size")
        header = json.dumps(self._header, separators=(",", ":")).encode()
        if len(header) > self._room:
            raise RuntimeError(f"more tensors in {self.path.name} than were announced")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(LENGTH_BYTES, "little"))
        self._file.write(header.ljust(self._room))
        self._file.flush()
        if is_durable:
            self.sync()

    def sync(self) -> None:
        """Wait until the disk has what was written; another thread may do so meanwhile."""
        os.fsync(self._file.fileno())
