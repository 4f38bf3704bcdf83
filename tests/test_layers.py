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


@pytest.mark.parametrize("module", [vllm_rvec, errors])
def test_all_is_sorted_and_complete(module: object) -> None:
    """`__all__` is what a module offers."""
    names: list[str] = module.__all__  # type: ignore[attr-defined]
    assert sorted(names, key=str.lower) == names or sorted(names) == names
    assert all(hasattr(module, name) for name in names)


def test_every_error_has_the_one_root() -> None:
    """One `except RvecError` catches all that is raised on purpose."""
    kinds = [getattr(errors, name) for name in errors.__all__]
    assert all(issubclass(kind, errors.RvecError) for kind in kinds)
