"""What deploy/monitoring/ asks of engines, a real engine says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.deploy.promql import selectors
from tests.deploy.test_monitoring import RULES, VLLM_LABELS, as_sent, queries
from tests.support.processes import engine_processes

if TYPE_CHECKING:
    from tests.support.processes import RunningServer

pytestmark = pytest.mark.engine


def test_every_metric_of_engines_is_there(demo: RunningServer) -> None:
    """With the labels that it is chosen and summed by."""
    (engine,) = engine_processes(demo.process.pid)
    command = engine.cmdline()
    port = command[command.index("--port") + 1]
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=20).text
    said = {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    expressions = [*(rule["expr"] for rule in RULES), *map(as_sent, queries())]
    found = {one.metric for text in expressions for one in selectors(text)}
    asked = {name for name in found if name.startswith("vllm:")}
    assert len(asked) > 5
    assert asked <= set(said)
    for name in asked:
        assert "model_name" in said[name]
        assert said[name] <= VLLM_LABELS
