"""The package as a whole: what it exports, and what it does not import."""

from __future__ import annotations

import subprocess
import sys

from vllm_rvec import router


def test_importing_the_router_imports_neither_torch_nor_vllm() -> None:
    """It starts fast, and runs where neither is installed."""
    code = "import sys, vllm_rvec.router; print(sorted({'torch', 'vllm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_documented() -> None:
    """`__all__` is the interface."""
    assert all(getattr(router, name).__doc__ for name in router.__all__)
    assert router.__all__ == sorted(router.__all__)
