"""What there is to be asked for: the metrics that router and vLLM export, by their code."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

from tests.router.telemetry.test_metrics import use_everything
from vllm_rvec.router.telemetry import Metrics

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["TARGET_LABELS", "router_metrics", "vllm_metrics"]

TARGET_LABELS = frozenset({"job", "instance"})
"""Prometheus adds these to whatever it scrapes."""
LOGGERS = Path("v1", "metrics", "loggers.py")
SUFFIXES = {
    "_counter_cls": ("_total",),
    "_gauge_cls": ("",),
    "_histogram_cls": ("_bucket", "_sum", "_count"),
}


@functools.cache
def router_metrics() -> dict[str, frozenset[str]]:
    """Its series and their labels, of everything that it counts."""
    metrics = Metrics()
    metrics.allow(["base"], ["assistant"])
    use_everything(metrics)
    body, _ = metrics.render()
    return {
        sample.name: frozenset(sample.labels) | TARGET_LABELS
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


@functools.cache
def vllm_metrics() -> frozenset[str]:
    """The names in the installed vLLM's source, which is far quicker to read than to import."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0], LOGGERS).read_text()
    return frozenset(_named(ast.parse(source)))


def _named(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        for word in node.keywords:
            if word.arg == "name" and isinstance(word.value, ast.Constant):
                name = str(word.value.value).removesuffix("_total")
                yield from (name + suffix for suffix in SUFFIXES.get(node.func.attr, ()))
