"""The programs that check deploy/, from .venv-deploy, and the locks of all environments.

A program that is missing fails; nothing skips.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
TOOLS = ROOT / ".venv-deploy" / "bin"


def pins(name: str) -> dict[str, str]:
    """Read a lock under requirements/: versions by package."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def tool(name: str) -> Path:
    """Find a program that `make setup` installs."""
    path = TOOLS / name
    assert path.exists(), f"{name} is missing: run make setup"
    return path


def run_tool(
    name: str, *arguments: object, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one at the repository's root, offline and without the user's settings."""
    return subprocess.run(
        [tool(name), *map(str, arguments)],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PATH": f"{TOOLS}:{os.environ['PATH']}", "HOME": "/nonexistent"},
    )
