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
    import argparse
    from collections.abc import Iterator

__all__ = ["LAYERS", "Files", "add_shape", "weights_bytes"]

MAKE = """
import sys
from pathlib import Path
from benchmarks.checkpoints import make_files
make_files(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
"""
COMPLETE = "complete.json"

TITLES = {
    "7b": "a 7B's shape",
    "7b-8k": "a 7B's shape with a vocabulary of 8192",
    "0.5b": "Qwen2-0.5B's shape",
    "tiny": "a tiny Qwen2",
}
LAYERS = {"7b": 2, "7b-8k": 1, "0.5b": 24, "tiny": 2}
"""So many give 1 GB, of 7b-8k half of it, of the tiny one 0.3 MB."""


@dataclass(frozen=True, slots=True)
class Files:
    """Where the files are, and of what shape."""

    folder: Path
    layers: int
    shape: str

    @classmethod
    @contextmanager
    def asked_for(cls, options: argparse.Namespace) -> Iterator[Files]:
        """Make the files that a command line asks for, as `made`."""
        layers = options.layers or LAYERS[options.shape]
        with cls.made(options.files, layers=layers, shape=options.shape) as files:
            yield files

    @classmethod
    @contextmanager
    def made(cls, folder: str | None, *, layers: int, shape: str) -> Iterator[Files]:
        """Make the files in a folder, or take those it has; in a temporary one where None.

        Raises:
            ValueError: The folder has files of another shape.
        """
        with ExitStack() as stack:
            if folder is None:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rvec-bench-"))
            files = cls(Path(folder).absolute(), layers, shape)
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
        name = TITLES[self.shape]
        return f"{name}, {self.layers} layers, {weights_bytes(self.target) / 1e9:.2f} GB in bf16"

    def complete(self) -> None:
        """Make what is not there yet; raises as `made`."""
        done, shape = self.folder / COMPLETE, {"layers": self.layers, "shape": self.shape}
        if not done.exists():
            arguments = [str(self.folder), str(self.layers), self.shape]
            subprocess.run([sys.executable, "-c", MAKE, *arguments], check=True)
            done.write_text(json.dumps(shape))
        elif (found := json.loads(done.read_text())) != shape:
            raise ValueError(f"{self.folder} has files of {found}, not of {shape}")


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Add the options that say of what shape the models are."""
    parser.add_argument("--shape", choices=LAYERS, default="7b", help="of the models' matrices")
    parser.add_argument("--layers", type=int, help="of the models; by default 1 GB of them")
    parser.add_argument(
        "--tiny", dest="shape", action="store_const", const="tiny", help="the same as --shape tiny"
    )
    parser.add_argument("--files", help="a folder to make the files in, or that has them already")


def weights_bytes(folder: Path) -> int:
    """Return the size of a folder's safetensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _offsets(shard: Path) -> list[tuple[int, int]]:
    with shard.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return [entry["data_offsets"] for entry in header.values()]
