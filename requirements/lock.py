"""Write requirements/cpu.txt: every package of the CPU environment, each at one version.

Run by `make lock`. pip resolves the project with its `cpu` and `dev` extras; what vLLM's metadata
pulls in and never uses on a CPU is left out, and so the lock is installed with `--no-deps`.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "cpu.txt"

LEFT_OUT = {
    # CUDA builds without a CPU twin: transformers imports them and fails on their operators.
    "torchvision",
    "torchaudio",
    "torchcodec",
    # A gigabyte of compiler that vLLM's CPU build does not call.
    "triton",
}

HEADER = """\
# Every package of the CPU environment (Linux x86-64, Python 3.11), written by `make lock`.
# Complete, and installed with --no-deps: see requirements/lock.py for what is left out and why.
"""


def main() -> None:
    """Resolve, filter, write."""
    command = [
        *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"),
        *("--report", "-", "torch==2.13.0", "hatchling", "editables", f"{ROOT}[cpu,dev]"),
    ]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    pins = dict(_pin(item["metadata"]) for item in report["install"])
    kept = sorted(pins.keys() - LEFT_OUT - {"vllm-rvec"})
    lines = [f"{name}=={pins[name]}\n" for name in kept]
    LOCK.write_text(HEADER + "".join(lines))


def _pin(metadata: dict[str, str]) -> tuple[str, str]:
    name = re.sub(r"[-_.]+", "-", metadata["name"]).lower()
    # `2.13.0+cpu` is the same release; the plain version resolves on any index.
    return name, metadata["version"].partition("+")[0]


if __name__ == "__main__":
    main()
