"""Metrics by their labels' values, cheap to add to, as Prometheus' collectors.

Prometheus' own take a lock for each change, for threads that there are none of here. What there is
to count is not here (`metrics`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from vllm_rvec.router.telemetry.latencies import Latencies

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from prometheus_client import Metric

__all__ = ["Family", "Histograms", "Number", "Numbers"]

ChildT = TypeVar("ChildT")
MetricT = TypeVar(
    "MetricT", bound="CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily"
)


class Family(Collector, Generic[ChildT, MetricT]):
    """A metric's children by their labels' values.

    Args:
        metric: What it is shown as.
        name: With the prefix.
        text: What it is, for people.
        labels: Their names.
        make: Makes a child.
    """

    def __init__(
        self,
        metric: type[MetricT],
        name: str,
        text: str,
        labels: Sequence[str],
        make: Callable[[], ChildT],
    ) -> None:
        self._metric = metric
        self._name = name
        self._text = text
        self._labels = labels
        self._make = make
        self._by_values: dict[tuple[str, ...], ChildT] = {}

    def child(self, *values: str) -> ChildT:
        """The one with these values; made where it isn't there."""
        child = self._by_values.get(values)
        if child is None:
            child = self._by_values[values] = self._make()
        return child

    def keep(self, is_kept: Callable[[Mapping[str, str]], bool]) -> None:
        """Remove all others."""
        for values in list(self._by_values):
            if not is_kept(dict(zip(self._labels, values, strict=True))):
                del self._by_values[values]

    def describe(self) -> Iterable[Metric]:
        """The metric, without its samples."""
        return [self._metric(self._name, self._text, labels=self._labels)]

    def collect(self) -> Iterable[Metric]:
        """The metric as it is now."""
        metric = self._metric(self._name, self._text, labels=self._labels)
        for values, child in self._by_values.items():
            self._add(metric, values, child)
        return [metric]

    def _add(self, metric: MetricT, values: Sequence[str], child: ChildT) -> None:
        raise NotImplementedError


class Number:
    """One number."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, by: float = 1) -> None:
        """Add to it."""
        self.value += by

    def dec(self) -> None:
        """Take one off."""
        self.value -= 1

    def set(self, value: float) -> None:
        """Make it another."""
        self.value = value


class Numbers(Family[Number, "CounterMetricFamily | GaugeMetricFamily"]):
    """A counter or a gauge; one without labels is shown from the beginning."""

    def __init__(
        self,
        metric: type[CounterMetricFamily | GaugeMetricFamily],
        name: str,
        text: str,
        labels: Sequence[str] = (),
    ) -> None:
        super().__init__(metric, name, text, labels, Number)
        if not labels:
            self.child()

    def _add(
        self,
        metric: CounterMetricFamily | GaugeMetricFamily,
        values: Sequence[str],
        child: Number,
    ) -> None:
        metric.add_metric(values, child.value)


class Histograms(Family[Latencies, HistogramMetricFamily]):
    """A histogram that takes a whole stream's latencies at once."""

    def __init__(
        self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float]
    ) -> None:
        super().__init__(HistogramMetricFamily, name, text, labels, lambda: Latencies(bounds))
        self._ends = [*map(floatToGoString, bounds), "+Inf"]

    def _add(self, metric: HistogramMetricFamily, values: Sequence[str], child: Latencies) -> None:
        buckets = list(zip(self._ends, child.cumulative(), strict=True))
        metric.add_metric(values, buckets, child.total_seconds)
