"""Read a checkpoint's tensors one at a time, memory-mapped."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from vllm_rvec.checkpoint.table import read_table
from vllm_rvec.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    import torch

    from vllm_rvec.checkpoint.table import TensorTable

__all__ = ["CheckpointReader"]


class CheckpointReader:
    """A folder's tensors by name; a context manager that closes its files.

    Tensors are views of the mapped file: nothing is read before it is used, and a tensor stays
    valid after the reader is closed. They are read-only by convention: never write into one.

    Args:
        folder: A checkpoint folder, as `read_table` takes it.
        table: Its tensor table, where the caller has read it already.

    Raises:
        CheckpointError: As for `read_table`.
    """

    def __init__(self, folder: Path, table: TensorTable | None = None) -> None:
        self.folder = folder
        self.table = read_table(folder) if table is None else table
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Tensors that were handed out stay valid."""
        self._open.clear()
        self._stack.close()

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor, on the CPU, in the dtype and shape of the file.

        Raises:
            KeyError: The checkpoint has no such tensor.
            CheckpointError: The file can't be read.
        """
        shard = self.table[name].shard
        try:
            tensor: torch.Tensor = self._shard(shard).get_tensor(name)
        except (SafetensorError, OSError) as exc:
            raise CheckpointError(
                f"tensor {name!r} can't be read from {shard}",
                why=str(exc),
                path=shard,
                tensor_name=name,
            ) from exc
        return tensor

    def _shard(self, shard: Path) -> Any:
        if shard not in self._open:
            self._open[shard] = self._stack.enter_context(safe_open(shard, framework="pt"))
        return self._open[shard]
