"""Write safetensors files tensor by tensor, in memory that does not grow with the file.

The safetensors library takes a whole file's tensors at once. This writer takes one at a time: it
leaves room for the header, appends the data, and fills the header in at the end, padded with
spaces as the format allows (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import torch

from vllm_rvec.checkpoint.dtypes import DTYPE_NAMES
from vllm_rvec.checkpoint.table import LENGTH_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import BinaryIO

__all__ = ["ShardWriter"]

HEADER_ALIGNMENT_BYTES = 8


class ShardWriter:
    """One safetensors file under construction; a context manager.

    The file is complete only after `finish`; left without it, the file has no valid header and
    no reader takes it.

    Args:
        path: The file to create. It must not exist.
        shapes: Every tensor that may be written, by name, with its shape: an upper bound that
            fixes the room for the header.
        dtype: The dtype of all tensors.
        metadata: Text pairs for the header's `__metadata__`.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        metadata: Mapping[str, str],
    ) -> None:
        self._metadata = dict(metadata)
        self._dtype = dtype
        self._header: dict[str, object] = {"__metadata__": self._metadata}
        self._offset = 0
        self._room = self._header_room(shapes)
        self._file: BinaryIO = path.open("xb")
        self._file.seek(LENGTH_BYTES + self._room)

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
        """Append one tensor, converted to the file's dtype.

        Args:
            name: One of the names announced to the constructor.
            tensor: Any float dtype, on the CPU.
        """
        data = tensor.detach().to(self._dtype).contiguous().reshape(-1).view(torch.uint8)
        self._header[name] = self._entry(tuple(tensor.shape), self._offset, data.numel())
        self._file.write(data.numpy().data)
        self._offset += data.numel()

    def finish(self) -> None:
        """Write the header and make the file durable."""
        header = json.dumps(self._header, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write(self._room.to_bytes(LENGTH_BYTES, "little"))
        self._file.write(header.ljust(self._room))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _entry(self, shape: tuple[int, ...], start: int, size_bytes: int) -> dict[str, object]:
        return {
            "dtype": DTYPE_NAMES[self._dtype],
            "shape": list(shape),
            "data_offsets": [start, start + size_bytes],
        }

    def _header_room(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        end = sum(torch.Size(shape).numel() for shape in shapes.values()) * self._dtype.itemsize
        widest = {name: self._entry(shape, end, 0) for name, shape in shapes.items()}
        header = json.dumps({"__metadata__": self._metadata, **widest}, separators=(",", ":"))
        room = len(header.encode())
        return room + -room % HEADER_ALIGNMENT_BYTES
