"""Kinds that Kubernetes does not bring along: the fields that deploy/ uses of each, and no others.

Written from the controllers' own definitions (LeaderWorkerSet v1, KEDA v1alpha1, Gateway API v1,
Prometheus operator v1), since validators have schemas for Kubernetes' own kinds only.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter
from pydantic.alias_generators import to_camel

Positive = Annotated[int, Field(gt=0)]
Duration = Annotated[str, StringConstraints(pattern=r"^([0-9]{1,5}(h|m|s|ms)){1,4}$")]


class Strict(BaseModel):
    """Refuses what it doesn't know, as an API server in strict mode does."""

    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class Metadata(Strict):
    """What every object has."""

    name: str
    namespace: str
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class RollingUpdate(Strict):
    """Of a LeaderWorkerSet's groups."""

    max_surge: int | str
    max_unavailable: int | str
    partition: int = 0


class RolloutStrategy(Strict):
    """How groups are replaced."""

    type: Literal["RollingUpdate"]
    rolling_update_configuration: RollingUpdate


class LeaderWorkerTemplate(Strict):
    """One group; its Pods are validated as Kubernetes' own."""

    leader_template: dict[str, Any]
    worker_template: dict[str, Any]
    size: Positive
    restart_policy: Literal["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]


class LeaderWorkerSetSpec(Strict):
    """How many groups, and of what."""

    replicas: Positive
    startup_policy: Literal["LeaderCreated", "LeaderReady"]
    rollout_strategy: RolloutStrategy
    leader_worker_template: LeaderWorkerTemplate


class LeaderWorkerSet(Strict):
    """Pods that are one engine together."""

    api_version: Literal["leaderworkerset.x-k8s.io/v1"]
    kind: Literal["LeaderWorkerSet"]
    metadata: Metadata
    spec: LeaderWorkerSetSpec


class ScaleTarget(Strict):
    """What is scaled."""

    api_version: Literal["apps/v1"]
    kind: Literal["Deployment"]
    name: str


class ScalingPolicy(Strict):
    """How much may change in which time."""

    type: Literal["Pods", "Percent"]
    value: Positive
    period_seconds: Annotated[int, Field(gt=0, le=1800)]


class ScalingRules(Strict):
    """In one direction."""

    stabilization_window_seconds: Annotated[int, Field(ge=0, le=3600)]
    policies: list[ScalingPolicy]


class Behavior(Strict):
    """As of a HorizontalPodAutoscaler."""

    scale_up: ScalingRules
    scale_down: ScalingRules


class ScalerConfig(Strict):
    """Goes to the HorizontalPodAutoscaler that KEDA makes."""

    behavior: Behavior


class Advanced(Strict):
    """Of a ScaledObject."""

    horizontal_pod_autoscaler_config: ScalerConfig


class PrometheusQuery(Strict):
    """Metadata of KEDA's scaler for Prometheus: all of it text."""

    server_address: str
    query: str
    threshold: str


class Trigger(Strict):
    """What to scale by."""

    type: Literal["prometheus"]
    metric_type: Literal["AverageValue", "Value"]
    metadata: PrometheusQuery


class Fallback(Strict):
    """While the metric can't be had."""

    failure_threshold: Positive
    replicas: Positive


class ScaledObjectSpec(Strict):
    """Between how many, and by what."""

    scale_target_ref: ScaleTarget
    min_replica_count: int
    max_replica_count: Positive
    polling_interval: Positive
    fallback: Fallback
    advanced: Advanced
    triggers: list[Trigger]


class ScaledObject(Strict):
    """KEDA's."""

    api_version: Literal["keda.sh/v1alpha1"]
    kind: Literal["ScaledObject"]
    metadata: Metadata
    spec: ScaledObjectSpec


class Named(Strict):
    """A header or the like."""

    name: str
    value: str


class ParentReference(Strict):
    """The Gateway."""

    name: str
    namespace: str


class PathMatch(Strict):
    """Which path."""

    type: Literal["Exact", "PathPrefix", "RegularExpression"]
    value: Annotated[str, StringConstraints(pattern=r"^/")]


class RouteMatch(Strict):
    """Which requests."""

    path: PathMatch
    headers: list[Named] = []


class HeaderModifier(Strict):
    """Which headers are set."""

    set: list[Named]


class RouteFilter(Strict):
    """What is changed on the way."""

    type: Literal["ResponseHeaderModifier"]
    response_header_modifier: HeaderModifier


class BackendReference(Strict):
    """A Service, and its part of the traffic."""

    name: str
    port: Annotated[int, Field(ge=1, le=65535)]
    weight: Annotated[int, Field(ge=0, le=1_000_000)] = 1
    filters: list[RouteFilter] = []


class Timeouts(Strict):
    """0s is none."""

    request: Duration


class RouteRule(Strict):
    """Matches are alternatives, conditions within one all hold."""

    matches: Annotated[list[RouteMatch], Field(max_length=64)]
    backend_refs: list[BackendReference]
    timeouts: Timeouts


class HTTPRouteSpec(Strict):
    """Where requests go."""

    parent_refs: list[ParentReference]
    hostnames: list[str]
    rules: Annotated[list[RouteRule], Field(max_length=16)]


class HTTPRoute(Strict):
    """Gateway API's."""

    api_version: Literal["gateway.networking.k8s.io/v1"]
    kind: Literal["HTTPRoute"]
    metadata: Metadata
    spec: HTTPRouteSpec


class MatchLabels(Strict):
    """A selector by labels."""

    match_labels: dict[str, str]


class Endpoint(Strict):
    """What is scraped: a Service's port, by name."""

    port: str
    path: str
    interval: Duration


class ServiceMonitorSpec(Strict):
    """Which Services."""

    selector: MatchLabels
    endpoints: list[Endpoint]


class ServiceMonitor(Strict):
    """The Prometheus operator's."""

    api_version: Literal["monitoring.coreos.com/v1"]
    kind: Literal["ServiceMonitor"]
    metadata: Metadata
    spec: ServiceMonitorSpec


class Rules(Strict):
    """Groups of rules; promtool knows more of them."""

    groups: list[dict[str, Any]]


class PrometheusRule(Strict):
    """The Prometheus operator's."""

    api_version: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PrometheusRule"]
    metadata: Metadata
    spec: Rules


Custom = LeaderWorkerSet | ScaledObject | HTTPRoute | ServiceMonitor | PrometheusRule

CUSTOM: TypeAdapter[Custom] = TypeAdapter(Annotated[Custom, Field(discriminator="kind")])
KINDS = frozenset(
    {"LeaderWorkerSet", "ScaledObject", "HTTPRoute", "ServiceMonitor", "PrometheusRule"}
)
"""Those for which a validator's warning is no failure: they are validated here."""
