"""What Prometheus gets, and what clients can't do to it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse

from vllm_rvec.router.assignment import Reason
from vllm_rvec.router.telemetry import (
    ErrorKind,
    Metrics,
    Observation,
    Outcome,
    RequestLabels,
    ShadowResult,
)

if TYPE_CHECKING:
    from prometheus_client import Metric

STICKY = RequestLabels("base", "assistant", Reason.STICKY)
OPEN_METRICS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.2"


@pytest.fixture
def metrics() -> Metrics:
    made = Metrics()
    made.allow(["base", "enhanced@1"], ["assistant"])
    return made


def families(metrics: Metrics) -> dict[str, Metric]:
    """What is rendered, as Prometheus' own parser reads it."""
    body, _ = metrics.render()
    return {family.name: family for family in parse(body.decode())}


def value(metrics: Metrics, sample: str, **labels: str) -> float | None:
    """One series of what is rendered."""
    found = [
        s.value
        for family in families(metrics).values()
        for s in family.samples
        if s.name == f"vllm_rvec_router_{sample}" and labels.items() == s.labels.items()
    ]
    assert len(found) < 2
    return found[0] if found else None


def series(metrics: Metrics) -> int:
    return sum(len(family.samples) for family in families(metrics).values())


def answer(status: int = 200, outcome: Outcome = Outcome.COMPLETE, *events: bytes) -> Observation:
    """A stream whose events come half a second after each other."""
    times = iter(range(100))
    seen = Observation(lambda: next(times) / 2)
    seen.head(status, "text/event-stream")
    for event in events:
        seen.chunk(event)
    seen.finish(outcome)
    return seen


TOKEN = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'


def use_everything(metrics: Metrics, variant: str = "base", alias: str = "assistant") -> None:
    """Touch every metric there is."""
    labels = RequestLabels(variant, alias, Reason.STICKY)
    metrics.record(labels, answer(200, Outcome.BROKEN, TOKEN, TOKEN, USAGE))
    metrics.record_refusal(labels, 429, ErrorKind.RATE_LIMITED)
    for result in ShadowResult:
        metrics.record_shadow(alias, variant, result)
    metrics.record_retry(variant)
    metrics.record_fallback(variant, variant)
    metrics.follow_dropped_results(2)
    metrics.record_reload(is_ok=True)
    metrics.record_reload(is_ok=False)
    metrics.set_generation(3)
    metrics.set_upstream(variant, "http://10.0.0.1:8000", is_up=True)
    metrics.set_weights(alias, {variant: 1})
    metrics.under_way(variant)()


def test_an_answer_is_counted_in_every_way(metrics: Metrics) -> None:
    """Requests, latencies and tokens, by variant, alias and reason."""
    metrics.record(STICKY, answer(200, Outcome.COMPLETE, TOKEN, TOKEN, TOKEN, USAGE))
    by = {"variant": "base", "alias": "assistant", "reason": "sticky"}
    assert value(metrics, "requests_total", **by, status_class="2xx") == 1
    assert value(metrics, "time_to_first_token_seconds_sum", **by) == 0.5
    assert value(metrics, "inter_token_latency_seconds_count", **by) == 2
    assert value(metrics, "inter_token_latency_seconds_bucket", **by, le="0.4") == 0
    assert value(metrics, "inter_token_latency_seconds_bucket", **by, le="0.5") == 2
    assert value(metrics, "request_duration_seconds_sum", **by) == 2.5
    assert value(metrics, "prompt_tokens_total", **by) == 7
    assert value(metrics, "generation_tokens_total", **by) == 3
    assert families(metrics)["vllm_rvec_router_errors"].samples == []


@pytest.mark.parametrize(
    ("seen", "kind"),
    [
        (answer(500), ErrorKind.UPSTREAM),
        (answer(503), ErrorKind.UPSTREAM),
        (answer(404), ErrorKind.REFUSED),
        (answer(200, Outcome.BROKEN, TOKEN), ErrorKind.BROKEN_STREAM),
        (answer(200, Outcome.COMPLETE, b'data: {"error": {}}\n\n'), ErrorKind.IN_STREAM),
        (answer(200, Outcome.BROKEN, b'data: {"error": {}}\n\n'), ErrorKind.BROKEN_STREAM),
    ],
)
def test_an_error_of_the_engine_is_counted_once_by_its_kind(
    metrics: Metrics, seen: Observation, kind: ErrorKind
) -> None:
    """Also those that come inside a 200."""
    metrics.record(STICKY, seen)
    errors = families(metrics)["vllm_rvec_router_errors"].samples
    assert [(s.labels["kind"], s.value) for s in errors] == [(kind, 1)]


def test_a_client_that_leaves_is_no_error(metrics: Metrics) -> None:
    """It is counted as a request, though."""
    metrics.record(STICKY, answer(200, Outcome.CLIENT_GONE, TOKEN))
    assert families(metrics)["vllm_rvec_router_errors"].samples == []


def test_a_whole_body_has_no_time_to_first_token(metrics: Metrics) -> None:
    """Its first byte comes with its last: as a latency it would drown those of streams."""
    seen = Observation()
    seen.head(200, "application/json")
    seen.chunk(b"{}")
    seen.finish(Outcome.COMPLETE)
    metrics.record(STICKY, seen)
    assert seen.ttft_seconds is not None
    assert families(metrics)["vllm_rvec_router_time_to_first_token_seconds"].samples == []


def test_ten_thousand_names_make_no_more_series_than_one(metrics: Metrics) -> None:
    """A client can't make Prometheus' memory grow, by whatever names it asks for."""
    use_everything(metrics)
    use_everything(metrics, "enhanced@0.0", "junk")
    before = series(metrics)
    for number in range(10_000):
        labels = RequestLabels(f"enhanced@0.{number}", f'\x00\n"{number}', Reason.ALPHA)
        metrics.record_refusal(labels, 404, ErrorKind.REFUSED)
        if number < 300:
            use_everything(metrics, f"enhanced@0.{number}", f'\x00\n"{number}')
    # Requests of a new reason and status, and errors of a new kind.
    assert series(metrics) == before + 2
    by = {"variant": "other", "alias": "other", "reason": "alpha", "status_class": "4xx"}
    assert value(metrics, "requests_total", **by) == 10_000


def test_statuses_that_are_none_make_one_series(metrics: Metrics) -> None:
    """An engine may send any number."""
    for status in (0, 42, 600, 999, -1):
        metrics.record(STICKY, answer(status))
    classes = {
        s.labels["status_class"] for s in families(metrics)["vllm_rvec_router_requests"].samples
    }
    assert classes == {"other"}


def test_what_is_not_known_is_an_empty_label(metrics: Metrics) -> None:
    """To Prometheus that is no label: a request by variant has no alias."""
    metrics.record_refusal(RequestLabels(), 401, ErrorKind.UNAUTHORIZED)
    assert value(metrics, "errors_total", variant="", alias="", kind="unauthorized") == 1


def test_series_of_what_is_gone_after_a_reload_are_removed(metrics: Metrics) -> None:
    """And those that stay keep their counts."""
    use_everything(metrics)
    use_everything(metrics, "enhanced@1")
    metrics.allow(["base"], [])
    body = metrics.render()[0].decode()
    assert "enhanced" not in body
    assert "assistant" not in body
    assert value(metrics, "retries_total", variant="base") == 1


def test_a_variant_that_comes_back_begins_anew(metrics: Metrics) -> None:
    """No child of a removed series is written into unseen."""
    metrics.record_retry("enhanced@1")
    metrics.allow(["base"], ["assistant"])
    metrics.record_retry("enhanced@1")
    metrics.allow(["base", "enhanced@1"], ["assistant"])
    metrics.record_retry("enhanced@1")
    assert value(metrics, "retries_total", variant="enhanced@1") == 1
    assert value(metrics, "retries_total", variant="other") == 1


def test_a_request_that_outlives_its_variant_leaves_the_gauges_right(metrics: Metrics) -> None:
    """Nothing is ever below 0 in flight."""
    end_old = metrics.under_way("enhanced@1")
    assert value(metrics, "requests_in_flight", variant="enhanced@1") == 1
    metrics.allow(["base"], ["assistant"])
    metrics.allow(["base", "enhanced@1"], ["assistant"])
    end_new = metrics.under_way("enhanced@1")
    assert value(metrics, "requests_in_flight", variant="enhanced@1") == 1
    end_new()
    end_old()
    assert value(metrics, "requests_in_flight", variant="enhanced@1") == 0


def test_weights_are_shown_as_shares(metrics: Metrics) -> None:
    """As the realised ones are; a variant that leaves the split has none."""
    metrics.set_weights("assistant", {"base": 30, "enhanced@1": 10})
    assert value(metrics, "configured_weight", alias="assistant", variant="enhanced@1") == 0.25
    metrics.set_weights("assistant", {"base": 30})
    assert value(metrics, "configured_weight", alias="assistant", variant="base") == 1
    assert value(metrics, "configured_weight", alias="assistant", variant="enhanced@1") is None


def test_upstreams_that_are_gone_are_removed(metrics: Metrics) -> None:
    """Their last state would alarm for ever."""
    metrics.set_upstream("base", "http://a", is_up=True)
    metrics.set_upstream("base", "http://b", is_up=False)
    metrics.set_upstream("unknown", "http://c", is_up=False)
    metrics.allow(["base"], ["assistant"], upstreams=[("base", "http://a")])
    samples = families(metrics)["vllm_rvec_router_upstream_up"].samples
    assert [(s.labels["upstream"], s.value) for s in samples] == [("http://a", 1)]


def test_everything_has_a_name_that_prometheus_takes(metrics: Metrics) -> None:
    """Its naming rules: letters, digits, `_`; counters end with _total, times with _seconds."""
    use_everything(metrics)
    found = families(metrics)
    assert len(found) == 16
    for family in found.values():
        assert re.fullmatch(r"vllm_rvec_router_[a-z]+(_[a-z]+)*", family.name)
        assert family.documentation.endswith(".")
        assert family.type in ("counter", "gauge", "histogram")
        if family.type == "counter":
            assert {s.name for s in family.samples} == {f"{family.name}_total"}
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
        for label in {label for s in family.samples for label in s.labels}:
            assert re.fullmatch(r"[a-z]+(_[a-z]+)*", label)


def test_the_answer_is_in_the_form_that_was_asked_for(metrics: Metrics) -> None:
    """OpenMetrics for those who accept it, plain text for all others; either can be read."""
    metrics.allow(['we"ird\n\\'], ["assistant"])
    use_everything(metrics, 'we"ird\n\\')
    for accept in (OPEN_METRICS, "application/openmetrics-text; version=x"):
        body, content_type = metrics.render(accept)
        assert content_type.startswith("application/openmetrics-text; version=1.0.0")
        assert len(list(parse_open(body.decode()))) == 16
    for accept in ("", "*/*", "text/plain", "junk;;=,", "text/plain; version=x"):
        body, content_type = metrics.render(accept)
        assert content_type.startswith("text/plain; version=0.0.4")
        assert len(list(parse(body.decode()))) == 16


def test_two_routers_in_one_process_share_nothing(metrics: Metrics) -> None:
    """Each has its own registry, unless it is given one."""
    registry = CollectorRegistry()
    other = Metrics(registry)
    metrics.follow_dropped_results(1)
    assert value(other, "results_dropped_total") == 0
    with pytest.raises(ValueError, match="Duplicated"):
        Metrics(registry)
