"""The files that benchmarks load: one target, its vector in every encoding, made once.

Made in a child process, so that whoever measures does not carry its memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Files", "weights_bytes"]

MAKE = """
import sys
from pathlib import Path
from benchmarks.checkpoints import make_files
make_files(Path(sys.argv[1]), int(sys.argv[2]), is_tiny=sys.argv[3] == "True")
"""
COMPLETE = "complete.json"


@dataclass(frozen=True, slots=True)
class Files:
    """Where the files are, and of what shape."""

    folder: Path
    layers: int
    is_tiny: bool

    @classmethod
    @contextmanager
    def made(cls, folder: str | None, *, layers: int, is_tiny: bool) -> Iterator[Files]:
        """Make the files in a folder, or take those it has; in a temporary one where None.

        Raises:
            ValueError: The folder has files of another shape.
        """
        with ExitStack() as stack:
            if folder is None:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rvec-bench-"))
            files = cls(Path(folder).absolute(), layers, is_tiny)
            files.complete()
            yield files

    @property
    def target(self) -> Path:
        """The checkpoint that vectors are added to, bf16."""
        return self.folder / "target"

    @property
    def donors(self) -> tuple[Path, Path]:
        """Tuned and base, bf16: what mergekit needs. Of the dense and the int8 vector."""
        return self.folder / "tuned", self.folder / "base"

    def vector(self, kind: str) -> Path:
        """A vector: `dense` in bf16; `sparse`, 90 % of its weights unchanged; `int8`."""
        return self.folder / kind

    @property
    def largest_tensor_bytes(self) -> int:
        """Of the target."""
        return max(
            int(end) - int(start)
            for shard in self.target.glob("*.safetensors")
            for start, end in _offsets(shard)
        )

    @property
    def title(self) -> str:
        """What the tables say they are about."""
        name = "a tiny Qwen2" if self.is_tiny else "Qwen2-0.5B's shape"
        return f"{name}, {self.layers} layers, {weights_bytes(self.target) / 1e9:.2f} GB in bf16"

    def complete(self) -> None:
        """Make what is not there yet; raises as `made`."""
        done, shape = self.folder / COMPLETE, {"layers": self.layers, "tiny": self.is_tiny}
        if not done.exists():
            arguments = [str(self.folder), str(self.layers), str(self.is_tiny)]
            subprocess.run([sys.executable, "-c", MAKE, *arguments], check=True)
            done.write_text(json.dumps(shape))
        elif (found := json.loads(done.read_text())) != shape:
            raise ValueError(f"{self.folder} has files of {found}, not of {shape}")


def weights_bytes(folder: Path) -> int:
    """Return the size of a folder's safetensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _offsets(shard: Path) -> list[tuple[int, int]]:
    with shard.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return [entry["data_offsets"] for entry in header.values()]
