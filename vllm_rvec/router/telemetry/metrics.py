"""The router's Prometheus metrics, in a registry of their own.

What clients write never becomes a label: names of variants and aliases that the configuration
doesn't have are counted as `other`. Time series, rates and quantiles are Prometheus' business;
which variant is better is `results`'.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics import exposition as openmetrics

from vllm_rvec.router.telemetry.families import Histograms, Numbers
from vllm_rvec.router.telemetry.latencies import (
    INTER_TOKEN_BUCKETS,
    REQUEST_BUCKETS,
    TIME_TO_FIRST_TOKEN_BUCKETS,
)
from vllm_rvec.router.telemetry.observation import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from vllm_rvec.router.assignment import Reason
    from vllm_rvec.router.telemetry.observation import Observation

__all__ = ["OTHER", "ErrorKind", "Metrics", "RequestLabels", "ShadowResult"]

PREFIX = "vllm_rvec_router_"

OTHER = "other"
"""The label of every name that is not in the configuration."""

VARIANT_LABELS = frozenset({"variant", "from", "to"})
"""Labels whose values are names of variants."""

BY_REQUEST = ("variant", "alias", "reason")

STATUS_CLASSES = {n: f"{n}xx" for n in range(1, 6)}

FamilyT = TypeVar("FamilyT", bound="Numbers | Histograms")


class ErrorKind(StrEnum):
    """What kept a client from its answer."""

    REFUSED = "refused"
    """The request was wrong, by the router's or the engine's word (4xx)."""
    UNAUTHORIZED = "unauthorized"
    """No key, or a wrong one."""
    RATE_LIMITED = "rate_limited"
    """The key has had its share."""
    BUSY = "busy"
    """The variant has as many requests under way as it may."""
    DOWN = "down"
    """The variant can't answer now."""
    UPSTREAM = "upstream"
    """The engine answered with a 5xx, or failed before its answer began."""
    BROKEN_STREAM = "broken_stream"
    """The engine broke off in the middle of its answer."""
    IN_STREAM = "in_stream"
    """An event inside a 200 says that the engine failed."""
    INTERNAL = "internal"
    """The router itself failed."""


class ShadowResult(StrEnum):
    """What became of a shadow request."""

    SENT = "sent"
    DROPPED = "dropped"
    FAILED = "failed"
    TIMED_OUT = "timed_out"


class RequestLabels(NamedTuple):
    """What a request is counted under; None where it wasn't known or there is none."""

    variant: str | None = None
    """Who answered, as asked for or chosen."""
    alias: str | None = None
    """The alias that the client asked for."""
    reason: Reason | None = None
    """Why it was this variant."""


class Metrics:
    """All metrics. Call it from one thread.

    Args:
        registry: Where they are registered; one of their own where it isn't given.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._registry = CollectorRegistry() if registry is None else registry
        self._variants: frozenset[str] = frozenset()
        self._aliases: frozenset[str] = frozenset()
        self._families: list[Numbers | Histograms] = []
        self._make_request_metrics()
        self._make_traffic_metrics()
        self._make_configuration_metrics()

    def _make_request_metrics(self) -> None:
        self._requests = self._counter(
            "requests_total", "Requests that have ended.", (*BY_REQUEST, "status_class")
        )
        self._errors = self._counter(
            "errors_total",
            "Requests without a whole answer, those that fail inside a 200 stream included.",
            ("variant", "alias", "kind"),
        )
        self._ttft = self._histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its stream's first generated event.",
            TIME_TO_FIRST_TOKEN_BUCKETS,
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds",
            "Between a stream's generated events; added when the stream ends.",
            INTER_TOKEN_BUCKETS,
        )
        self._duration = self._histogram(
            "request_duration_seconds",
            "From a request's arrival to the end of its answer.",
            REQUEST_BUCKETS,
        )
        self._prompt_tokens = self._counter(
            "prompt_tokens_total", "Prompt tokens, where answers tell them.", BY_REQUEST
        )
        self._generation_tokens = self._counter(
            "generation_tokens_total", "Generated tokens, where answers tell them.", BY_REQUEST
        )

    def _make_traffic_metrics(self) -> None:
        self._in_flight = self._gauge("requests_in_flight", "Requests under way.", ("variant",))
        self._shadows = self._counter(
            "shadow_requests_total",
            "Copies for a shadow variant, by what became of them.",
            ("alias", "variant", "result"),
        )
        self._retries = self._counter(
            "retries_total", "Requests sent once more inside their variant.", ("variant",)
        )
        self._fallbacks = self._counter(
            "fallbacks_total", "Requests that another variant answered.", ("from", "to")
        )
        self._upstream_up = self._gauge(
            "upstream_up", "1 where the engine can answer, else 0.", ("variant", "upstream")
        )

    def _make_configuration_metrics(self) -> None:
        self._generation = self._gauge(
            "configuration_generation", "How often the configuration has been set."
        )
        self._reloads = self._counter(
            "configuration_reloads_total", "Reloads of the configuration.", ("result",)
        )
        self._weights = self._gauge(
            "configured_weight", "A variant's share of an alias, of 1.", ("alias", "variant")
        )
        self._dropped_seen = 0
        self._results_dropped = self._counter(
            "results_dropped_total", "Exposures that were not kept."
        )

    def allow(
        self,
        variants: Collection[str],
        aliases: Collection[str],
        upstreams: Collection[tuple[str, str]] | None = None,
    ) -> None:
        """Say which names there are, at the start and after each reload.

        Series of names that are gone are removed. Requests under way may still end; they are
        counted as `other`.

        Args:
            variants: The variants of the configuration.
            aliases: Its aliases.
            upstreams: Variants and their upstreams' addresses; where given, the others' series
                are removed.
        """
        self._variants = frozenset(variants)
        self._aliases = frozenset(aliases)
        for family in self._families:
            family.keep(self._is_allowed)
        if upstreams is not None:
            there = set(upstreams)
            self._upstream_up.keep(lambda of: (of["variant"], of["upstream"]) in there)

    def under_way(self, variant: str | None) -> Callable[[], None]:
        """Count a request as under way.

        Its gauge may be removed meanwhile; another of that name stays right.

        Returns:
            What ends it; to be called once.
        """
        gauge = self._in_flight.child(self._variant(variant))
        gauge.inc()
        return gauge.dec

    def record(self, labels: RequestLabels, seen: Observation) -> None:
        """Count a request that an engine has answered, or begun to.

        Args:
            labels: What it is counted under.
            seen: Its answer, finished.
        """
        variant, alias, reason = key = self._key(labels)
        self._requests.child(*key, _status_class(seen.status)).inc()
        if (kind := error_kind(seen)) is not None:
            self._errors.child(variant, alias, kind).inc()
        if seen.duration_seconds is not None:
            self._duration.child(*key).add(seen.duration_seconds)
        if seen.is_stream and seen.ttft_seconds is not None:
            self._ttft.child(*key).add(seen.ttft_seconds)
        if seen.inter_token_latencies is not None:
            self._inter_token.child(*key).merge(seen.inter_token_latencies)
        if seen.prompt_tokens is not None:
            self._prompt_tokens.child(variant, alias, reason).inc(seen.prompt_tokens)
        if seen.completion_tokens is not None:
            self._generation_tokens.child(variant, alias, reason).inc(seen.completion_tokens)

    def record_refusal(self, labels: RequestLabels, status: int, kind: ErrorKind) -> None:
        """Count a request that the router answered itself, with an error.

        Args:
            labels: What it is counted under.
            status: The HTTP status.
            kind: Why.
        """
        variant, alias, reason = self._key(labels)
        self._requests.child(variant, alias, reason, _status_class(status)).inc()
        self._errors.child(variant, alias, kind.value).inc()

    def record_gone(self, labels: RequestLabels) -> None:
        """Count a request whose client left before an answer began.

        Args:
            labels: What it is counted under; its class of status is empty.
        """
        self._requests.child(*self._key(labels), _status_class(None)).inc()

    def record_shadow(self, alias: str, variant: str, result: ShadowResult) -> None:
        """Count a copy for a shadow variant."""
        self._shadows.child(self._alias(alias), self._variant(variant), result.value).inc()

    def record_retry(self, variant: str) -> None:
        """Count a request that is sent once more."""
        self._retries.child(self._variant(variant)).inc()

    def record_fallback(self, from_variant: str, to_variant: str) -> None:
        """Count a request that goes to another variant because its own can't answer."""
        self._fallbacks.child(self._variant(from_variant), self._variant(to_variant)).inc()

    def follow_dropped_results(self, total: int) -> None:
        """Take in how many exposures were not kept so far.

        Args:
            total: Since the start; it only grows.
        """
        self._results_dropped.child().inc(max(0, total - self._dropped_seen))
        self._dropped_seen = total

    def record_reload(self, *, is_ok: bool) -> None:
        """Count an attempt to reload the configuration."""
        self._reloads.child("ok" if is_ok else "failed").inc()

    def set_generation(self, generation: int) -> None:
        """Note how often the configuration has been set."""
        self._generation.child().set(generation)

    def set_upstream(self, variant: str, upstream: str, *, is_up: bool) -> None:
        """Note whether an upstream can answer.

        Args:
            variant: One of those allowed; others are passed over.
            upstream: Its address, of the configuration.
            is_up: Whether it can.
        """
        if variant in self._variants:
            self._upstream_up.child(variant, upstream).set(is_up)

    def set_weights(self, alias: str, weights: Mapping[str, float]) -> None:
        """Note an alias's configured split; variants that are no longer in it are removed.

        Args:
            alias: One of those allowed; others are passed over.
            weights: Relative weights; what is shown is each one's share of their sum.
        """
        if alias not in self._aliases:
            return
        allowed = {name: weight for name, weight in weights.items() if name in self._variants}
        self._weights.keep(lambda of: of["alias"] != alias or of["variant"] in allowed)
        total = sum(weights.values())
        for name, weight in allowed.items():
            self._weights.child(alias, name).set(weight / total if total else 0.0)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Everything, as Prometheus reads it.

        Args:
            accept: The request's `Accept`: OpenMetrics where it asks for that, else plain text.

        Returns:
            The body and its `Content-Type`.
        """
        # prometheus_client's own choice by `Accept` fails on versions that are none.
        if "application/openmetrics-text" in accept:
            body: bytes = openmetrics.generate_latest(self._registry)  # type: ignore[no-untyped-call]
            return body, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    def _variant(self, name: str | None) -> str:
        return _bounded(name, self._variants)

    def _alias(self, name: str | None) -> str:
        return _bounded(name, self._aliases)

    def _key(self, labels: RequestLabels) -> tuple[str, str, str]:
        reason = "" if labels.reason is None else labels.reason.value
        return self._variant(labels.variant), self._alias(labels.alias), reason

    def _is_allowed(self, labels: Mapping[str, str]) -> bool:
        for label, value in labels.items():
            if value in ("", OTHER):
                continue
            if label in VARIANT_LABELS and value not in self._variants:
                return False
            if label == "alias" and value not in self._aliases:
                return False
        return True

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Numbers:
        return self._registered(Numbers(CounterMetricFamily, PREFIX + name, text, labels))

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Numbers:
        return self._registered(Numbers(GaugeMetricFamily, PREFIX + name, text, labels))

    def _histogram(self, name: str, text: str, bounds: Sequence[float]) -> Histograms:
        return self._registered(Histograms(PREFIX + name, text, BY_REQUEST, bounds))

    def _registered(self, family: FamilyT) -> FamilyT:
        self._registry.register(family)
        self._families.append(family)
        return family


def error_kind(seen: Observation) -> ErrorKind | None:
    """What an answer's error is counted as; None where there is none."""
    if seen.status is not None and seen.status >= 400:
        return ErrorKind.UPSTREAM if seen.status >= 500 else ErrorKind.REFUSED
    # Both where the router tells the break in an event: the cause is the break.
    if seen.outcome is Outcome.BROKEN:
        return ErrorKind.BROKEN_STREAM
    return ErrorKind.IN_STREAM if seen.has_error_event else None


def _bounded(name: str | None, allowed: frozenset[str]) -> str:
    """A label that a client can't choose: a name of the configuration, `other`, or none."""
    if name is None:
        return ""
    return name if name in allowed else OTHER


def _status_class(status: int | None) -> str:
    """`2xx` and so on; empty where no answer began."""
    return "" if status is None else STATUS_CLASSES.get(status // 100, OTHER)
