"""Imports: what starts fast stays free of torch and vLLM."""

from __future__ import annotations

import subprocess
import sys

import pytest

import vllm_rvec
from vllm_rvec import errors


@pytest.mark.parametrize(
    "module",
    [
        "vllm_rvec",
        "vllm_rvec.errors",
        "vllm_rvec.checkpoint",
        "vllm_rvec.vector",
        "vllm_rvec.vector.compatibility",
        "vllm_rvec.loader",
        "vllm_rvec.serve",
        "vllm_rvec.router",
        "vllm_rvec.cli.main",
    ],
)
def test_importing_needs_neither_torch_nor_vllm(module: str) -> None:
    """`--help` answers at once, and vLLM's processes load the plugin for next to nothing."""
    code = (
        f"import sys, {module}; "
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_error_is_offered() -> None:
    """`__all__` of errors.py has each class in it (ruff keeps it sorted)."""
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert {name for name in kinds if name.endswith("Error")} <= set(errors.__all__)
    assert all(hasattr(vllm_rvec, name) for name in vllm_rvec.__all__)


def test_every_error_has_the_one_root() -> None:
    """One `except RvecError` catches all that is raised on purpose."""
    kinds = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]
    assert all(issubclass(kind, errors.RvecError) for kind in kinds)
