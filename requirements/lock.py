"""Write the locks of what is made from this project: every package, each at one version.

Run by `make lock`. The CPU environment comes first; the images' locks take its versions, so that
what runs in a cluster is what the tests ran with. All are installed with `--no-deps`, for each
leaves out what would never be used there.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"

UNUSED_ON_A_CPU = frozenset(
    {
        # CUDA builds without a CPU twin: transformers imports them and fails on their operators.
        "torchvision",
        "torchaudio",
        "torchcodec",
        # A gigabyte of compiler that vLLM's CPU build does not call.
        "triton",
    }
)
UNUSED_BY_THE_ROUTER = frozenset({"torch", "scipy"})
"""Router, `fetch` and `check-config` import neither: tests/deploy/test_router_image.py."""


@dataclass(frozen=True)
class Lock:
    """One file under requirements/.

    Attributes:
        name: The file's.
        what: The environment's name, for the first line.
        asked: What pip resolves.
        left_out: Packages that are not to be installed.
        like: A lock whose versions are taken, where it has them.
    """

    name: str
    what: str
    asked: tuple[str, ...]
    left_out: frozenset[str]
    like: str | None = None

    def write(self) -> None:
        """Resolve, filter, write."""
        pins = dict(_pin(item["metadata"]) for item in self._resolve())
        kept = sorted(pins.keys() - self.left_out - {"vllm-rvec"})
        lines = [f"{name}=={pins[name]}\n" for name in kept]
        (REQUIREMENTS / self.name).write_text(self._header() + "".join(lines))

    def _header(self) -> str:
        return (
            f"# Every package of {self.what} (Linux x86-64, Python 3.11), written by `make lock`.\n"
            "# Complete, and installed with --no-deps: see requirements/lock.py for what is left "
            "out and why.\n"
        )

    def _resolve(self) -> list[dict[str, dict[str, str]]]:
        like = () if self.like is None else ("--constraint", str(REQUIREMENTS / self.like))
        with tempfile.NamedTemporaryFile(suffix=".json") as report:
            command = [
                *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"),
                *("--quiet", *like, "--report", report.name, *self.asked),
            ]
            subprocess.run(command, check=True)
            found: list[dict[str, dict[str, str]]] = json.load(report)["install"]
        return found


def main() -> None:
    """Write each, the one that others follow first."""
    for lock in _locks():
        lock.write()


def _locks() -> tuple[Lock, ...]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    stores = (*extras["s3"], *extras["gs"])
    core = tuple(
        line for line in project["dependencies"] if _name(line) not in UNUSED_BY_THE_ROUTER
    )
    return (
        Lock(
            "cpu.txt",
            "the CPU environment",
            ("torch==2.13.0", "hatchling", "editables", f"{ROOT}[cpu,dev]"),
            UNUSED_ON_A_CPU,
        ),
        Lock("router.txt", "the router's image", (*core, *stores), UNUSED_BY_THE_ROUTER, "cpu.txt"),
        Lock(
            "engine-cpu.txt",
            "the CPU engine's image",
            ("torch==2.13.0", f"{ROOT}[cpu,s3,gs]"),
            UNUSED_ON_A_CPU,
            "cpu.txt",
        ),
    )


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()


def _pin(metadata: dict[str, str]) -> tuple[str, str]:
    name = re.sub(r"[-_.]+", "-", metadata["name"]).lower()
    # `2.13.0+cpu` is the same release; the plain version resolves on any index.
    return name, metadata["version"].partition("+")[0]


if __name__ == "__main__":
    main()
