"""Serving starts fast: an engine is a command, not an import."""

from __future__ import annotations

import subprocess
import sys

from vllm_rvec import serve


def test_neither_torch_nor_vllm_is_imported() -> None:
    """Importing vllm_rvec.serve leaves both out of sys.modules."""
    code = (
        "import sys, vllm_rvec.serve, vllm_rvec.serve.guard; "
        "print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_the_public_names_are_complete() -> None:
    """__all__ is sorted, and each name is there."""
    assert serve.__all__ == sorted(serve.__all__)
    assert all(hasattr(serve, name) for name in serve.__all__)
