"""Real engines, started once for all tests that only ask them something."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.processes import RunningServer, run_serve

if TYPE_CHECKING:
    from collections.abc import Iterator

    import openai

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "reasoning_in_miniature"


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The demo as `make demo` starts it: one engine for all alphas behind the router."""
    log = tmp_path_factory.mktemp("demo") / "serve.log"
    with run_serve(["--config", str(DEMO / "serve.yaml")], log) as server:
        yield server


@pytest.fixture(scope="session")
def fused_demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The demo with an engine for each of base and enhanced@1, fused at load."""
    log = tmp_path_factory.mktemp("fused-demo") / "serve.log"
    with run_serve(["--config", str(DEMO / "serve.yaml"), "--mode", "fused"], log) as server:
        yield server


@pytest.fixture
def client(demo: RunningServer) -> openai.OpenAI:
    """A real OpenAI client for the demo."""
    return demo.client()
