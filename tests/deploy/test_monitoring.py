"""deploy/monitoring/: rules and dashboard parse, alerts fire when they should, names exist."""

from __future__ import annotations

import json
import re
from itertools import combinations
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.deploy.exported import TARGET_LABELS, router_metrics, vllm_metrics
from tests.deploy.promql import selectors
from tests.deploy.tools import DEPLOY, run_tool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MONITORING = DEPLOY / "monitoring"
VLLM_LABELS = TARGET_LABELS | {"model_name", "engine", "le"}
OWN = "vllm_rvec_router_"


def read(name: str) -> Any:
    return yaml.safe_load((MONITORING / name).read_text())


RULES: list[dict[str, Any]] = [
    rule for group in read("rules.yaml")["groups"] for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
PANELS: list[dict[str, Any]] = [p for p in DASHBOARD["panels"] if p["type"] != "row"]


def recorded() -> set[str]:
    return {rule["record"] for rule in RULES if "record" in rule}


def queries() -> Iterator[str]:
    """Every expression of the dashboard, as Grafana would send it."""
    for panel in PANELS:
        yield from (target["expr"] for target in panel["targets"])
    yield from (note["expr"] for note in DASHBOARD["annotations"]["list"])


def as_sent(query: str) -> str:
    query = query.replace("$__rate_interval", "1m")
    for variable in DASHBOARD["templating"]["list"]:
        query = query.replace(f"${variable['name']}", ".*")
    return query


def test_prometheus_takes_its_configuration() -> None:
    """With the rules that it names, by Prometheus' own checker."""
    done = run_tool("promtool", "check", "config", MONITORING / "prometheus.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rules found" in done.stdout


def test_alerts_fire_when_they_should_and_not_otherwise() -> None:
    """By promtool, on made-up series."""
    done = run_tool("promtool", "test", "rules", MONITORING / "rules_test.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_test_in_which_it_fires() -> None:
    """And one moment at least in which it does not, or nothing would tell it from `always`."""
    tests = [case for test in read("rules_test.yaml")["tests"] for case in test["alert_rule_test"]]
    alerts = {rule["alert"] for rule in RULES if "alert" in rule}
    assert alerts == {case["alertname"] for case in tests if case["exp_alerts"]}
    quiet = {case["alertname"] for case in tests if not case["exp_alerts"]}
    # The others are silent beside a second series in the same test.
    assert alerts - quiet == {
        "RvecUpstreamDown",
        "RvecShadowDrops",
        "RvecEngineQueue",
        "RvecKvCacheFull",
    }


def test_alerts_say_what_is_and_what_to_do() -> None:
    """A severity, a summary, a description."""
    for rule in RULES:
        if "alert" in rule:
            assert rule["labels"]["severity"] in {"critical", "warning"}
            assert set(rule["annotations"]) == {"summary", "description"}


def test_each_alert_is_explained() -> None:
    """In the folder's README, and no other is."""
    explained = re.findall(
        r"^\| `(Rvec\w+)` \|", (MONITORING / "README.md").read_text(), re.MULTILINE
    )
    assert explained == [rule["alert"] for rule in RULES if "alert" in rule]


def test_dashboard_queries_are_promql(tmp_path: Path) -> None:
    """Promtool parses them as rules."""
    found = [
        {"record": f"dashboard:query:{number}", "expr": as_sent(query)}
        for number, query in enumerate(queries())
    ]
    assert "$" not in json.dumps(found)
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": found}]}))
    done = run_tool("promtool", "check", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(found)} rules found" in done.stdout


def test_names_are_found_in_expressions() -> None:
    """Not words of the language, labels, or what stands in strings."""
    found = selectors(
        'sum by (le) (rate(a:b{job=~"{x"}[5m])) / on (le) group_left c offset 5m > 0.5'
    )
    assert [(one.metric, sorted(one.labels)) for one in found] == [("a:b", ["job"]), ("c", [])]


@pytest.mark.parametrize("query", [*(rule["expr"] for rule in RULES), *map(as_sent, queries())])
def test_every_metric_is_exported(query: str) -> None:
    """By the router, the installed vLLM, a rule that records it, or Prometheus itself."""
    ours, theirs = router_metrics(), vllm_metrics()
    found = selectors(query)
    assert found
    for selector in found:
        if selector.metric.startswith(OWN):
            assert selector.labels <= ours[selector.metric] | {"le"}
        elif selector.metric.startswith("vllm:"):
            assert selector.metric in theirs
            assert selector.labels <= VLLM_LABELS
        else:
            assert selector.metric in recorded() | {"ALERTS"}


def test_the_dashboard_shows_what_an_operator_asks() -> None:
    """Each by a query of its own, for the variants that are chosen."""
    text = " ".join(queries())
    for metric in (
        "rvec:split_share:ratio1h",
        "rvec:configured_share",
        "vllm_rvec_router_time_to_first_token_seconds_bucket",
        "vllm_rvec_router_inter_token_latency_seconds_bucket",
        "vllm_rvec_router_errors_total",
        "vllm_rvec_router_shadow_requests_total",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
    ):
        assert metric in text
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "job", "alias", "variant"}
    everything = json.dumps(DASHBOARD["panels"])
    assert all(f"${name}" in everything or f"${{{name}}}" in everything for name in variables)


def test_panels_lie_beside_each_other() -> None:
    """Each with an id of its own, a title and a word of what it says."""
    every = DASHBOARD["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    assert all(panel["title"] and panel["description"] for panel in PANELS)
    for one, other in combinations([panel["gridPos"] for panel in every], 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y
