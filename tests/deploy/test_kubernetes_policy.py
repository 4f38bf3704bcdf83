"""deploy/kubernetes: rules that every rendered object keeps, whichever overlay it is in."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.deploy.rendered import (
    TARGETS,
    Object,
    Pod,
    objects,
    of_kind,
    pods,
    rendered_text,
    selects,
)
from vllm_rvec import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMESPACE = "vllm-rvec"
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
"""A DNS label: what a Service's name must be, and what all names here are."""
KEY = re.compile(r"([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?")
VALUE = re.compile(r"([A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?)?")
SECRET_NAME = re.compile(r"KEY|TOKEN|PASSWORD|SECRET|CREDENTIAL")
SECRET_TEXT = re.compile(
    r"\b(hf_\w{20,}|sk-\w{16,}|AKIA\w{12,}|AIza\w{20,})|PRIVATE KEY|://[^/\s:]+:[^/\s@]+@"
)

pytestmark = pytest.mark.parametrize("target", TARGETS)


def label_maps(value: object) -> Iterator[dict[str, str]]:
    """Find labels and selectors, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in {"labels", "matchLabels"}:
                yield inner
            else:
                yield from label_maps(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from label_maps(inner)


def answers_http(container: Object) -> bool:
    """Init containers and the headless ranks of a group answer nobody."""
    return "ports" in container


def each_container(target: str) -> Iterator[tuple[Pod, Object]]:
    for pod in pods(target):
        for container in pod.containers:
            yield pod, container


def test_names_and_labels_are_legal(target: str) -> None:
    """No `@`, and no dot in what becomes a host's name."""
    for found in objects(target):
        assert LABEL.fullmatch(found["metadata"]["name"])
        for labels in label_maps(found):
            assert all(map(KEY.fullmatch, labels))
            assert all(map(VALUE.fullmatch, labels.values()))


def test_everything_is_in_the_one_namespace(target: str) -> None:
    """Which itself refuses Pods that are less restricted."""
    (namespace,) = of_kind(target, "Namespace")
    assert namespace["metadata"]["name"] == NAMESPACE
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    others = [found for found in objects(target) if found["kind"] != "Namespace"]
    assert {found["metadata"]["namespace"] for found in others} == {NAMESPACE}


def test_images_have_the_packages_version(target: str) -> None:
    """A name with its registry, and never what happens to be latest."""
    images = {container["image"] for _, container in each_container(target)}
    assert images <= {
        f"registry.example.com/vllm-rvec/{name}:{__version__}" for name in ("engine", "router")
    }


def test_every_container_says_what_it_needs(target: str) -> None:
    """Memory has a limit; processor time has none, which would only slow a load down."""
    for _, container in each_container(target):
        resources = container["resources"]
        assert {"cpu", "memory"} <= resources["requests"].keys()
        assert "memory" in resources["limits"]
        gpus = [resources[part].get("nvidia.com/gpu") for part in ("requests", "limits")]
        assert gpus[0] == gpus[1]
        is_engine = container["name"] == "engine"
        assert (gpus[0] is not None) == is_engine


def test_what_needs_a_gpu_may_go_where_they_are(target: str) -> None:
    """On nodes that keep off by a taint what asks for none."""
    for pod in pods(target):
        is_engine = any(container["name"] == "engine" for container in pod.containers)
        keys = [taint["key"] for taint in pod.spec.get("tolerations", [])]
        assert keys == (["nvidia.com/gpu"] if is_engine else [])


def test_whatever_answers_is_probed(target: str) -> None:
    """At its start, for life, and for traffic."""
    probed = [c for _, c in each_container(target) if answers_http(c)]
    assert probed
    for container in probed:
        ports = {port["name"] for port in container["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["port"] in ports
    unprobed = [c for p in pods(target) for c in p.spec["containers"] if not answers_http(c)]
    assert all("--headless" in c["args"] for c in unprobed)


def test_a_load_of_a_large_model_is_waited_for(target: str) -> None:
    """A 70B and a dense vector, 282 GB, at 200 MB/s, with ten minutes for the rest."""
    for pod, container in each_container(target):
        if container["name"] == "engine" and answers_http(container):
            probe = container["startupProbe"]
            budget = probe["periodSeconds"] * probe["failureThreshold"]
            assert budget >= 282e9 / 200e6 + 600, pod.name


def test_pods_are_restricted(target: str) -> None:
    """No root, no writable image, no capability, no token of the cluster."""
    for pod in pods(target):
        spec = pod.spec
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] >= 10000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
        for container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_what_is_mounted_is_there(target: str) -> None:
    """Volumes, and the objects of the same overlay that they come from."""
    for pod in pods(target):
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        mounted = {mount["name"] for c in pod.containers for mount in c["volumeMounts"]}
        assert mounted == volumes.keys()
        for volume in volumes.values():
            if "configMap" in volume:
                assert volume["configMap"]["name"] in names(target, "ConfigMap")
            elif "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert claim in names(target, "PersistentVolumeClaim")
            elif "secret" in volume:
                assert volume["secret"] == {"secretName": "object-store", "optional": True}
            else:
                assert "sizeLimit" in volume["emptyDir"]


def names(target: str, kind: str) -> set[str]:
    return {found["metadata"]["name"] for found in of_kind(target, kind)}


def test_programs_have_where_to_write(target: str) -> None:
    """With a read-only image: a home and /tmp; engines memory to share; weights are only read."""
    for pod, container in each_container(target):
        mounts = {m["mountPath"]: m.get("readOnly", False) for m in container["volumeMounts"]}
        home = {e["name"]: e.get("value") for e in container["env"]}["HOME"]
        assert mounts[home] is False
        assert mounts["/tmp"] is False  # noqa: S108
        if container["name"] == "engine":
            assert mounts["/weights"] is True
            (shm,) = [v for v in pod.spec["volumes"] if v["name"] == "shm"]
            assert shm["emptyDir"]["medium"] == "Memory"
            assert mounts["/dev/shm"] is False  # noqa: S108


def test_keys_of_the_store_are_for_the_fetch_only(target: str) -> None:
    """As variables, and as a file; no engine has them."""
    for pod, container in each_container(target):
        has = [mount["mountPath"] for mount in container["volumeMounts"]].count("/etc/object-store")
        sources = [
            source.get("secretRef", {}).get("name") for source in container.get("envFrom", [])
        ]
        is_fetch = container["name"] == "vector"
        assert (has, "object-store" in sources) == (int(is_fetch), is_fetch), pod.name


def test_no_secret_is_in_clear(target: str) -> None:
    """Keys are names of Secrets that whoever installs it makes."""
    assert not of_kind(target, "Secret")
    assert not SECRET_TEXT.search(rendered_text(target))
    for _, container in each_container(target):
        for variable in container["env"]:
            if SECRET_NAME.search(variable["name"]):
                assert "secretKeyRef" in variable["valueFrom"]


def test_services_and_budgets_select_pods(target: str) -> None:
    """Each something, and no engine's Service another engine's Pods."""
    labels = [pod.labels for pod in pods(target)]
    for service in of_kind(target, "Service"):
        chosen = [found for found in labels if selects(service["spec"]["selector"], found)]
        assert len(chosen) == 1
    for budget in of_kind(target, "PodDisruptionBudget"):
        selector = budget["spec"]["selector"]["matchLabels"]
        assert any(selects(selector, found) for found in labels)


def test_nothing_is_open_by_default(target: str) -> None:
    """One policy for all Pods, with no rule; every other is for some."""
    policies = [policy["spec"] for policy in of_kind(target, "NetworkPolicy")]
    (nothing,) = [policy for policy in policies if policy["podSelector"] == {}]
    assert nothing == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    labels = [pod.labels for pod in pods(target)]
    for policy in policies:
        if policy is not nothing:
            chosen = policy["podSelector"]["matchLabels"]
            assert any(selects(chosen, found) for found in labels)


def test_engines_are_reached_by_few(target: str) -> None:
    """Router or Gateway, and Prometheus, at one port; a group's own Pods at any."""
    door = "gateways" if target == "overlays/gateway" else "router"
    for pod in pods(target):
        if pod.labels["app.kubernetes.io/component"] == "engine":
            found = {who for rule in rules(target, pod, "ingress") for who in peers(rule, "from")}
            group = {"group"} if target == "overlays/multinode" else set()
            assert found == {door, "monitoring"} | group


def test_the_router_reaches_engines_and_names_only(target: str) -> None:
    """What anybody may ask of it, it can't be made to ask of others."""
    for pod in pods(target):
        if pod.labels["app.kubernetes.io/component"] == "router":
            found = {who for rule in rules(target, pod, "egress") for who in peers(rule, "to")}
            assert found == {"engine", "kube-system"}


def rules(target: str, pod: Pod, direction: str) -> list[Object]:
    """Return all rules for a Pod."""
    return [
        rule
        for policy in of_kind(target, "NetworkPolicy")
        if selects(policy["spec"]["podSelector"].get("matchLabels", {}), pod.labels)
        for rule in policy["spec"].get(direction, [])
    ]


def peers(rule: Object, key: str) -> Iterator[str]:
    """Say whom a rule names; nobody is everybody."""
    for peer in rule.get(key, [{}]):
        space = peer.get("namespaceSelector", {}).get("matchLabels", {})
        labels = peer.get("podSelector", {}).get("matchLabels", {})
        is_group = "leaderworkerset.sigs.k8s.io/name" in labels
        yield (
            space.get("kubernetes.io/metadata.name")
            or labels.get("app.kubernetes.io/component")
            or ("group" if is_group else "everybody")
        )


def test_the_router_is_many(target: str) -> None:
    """Two at least, one at a time taken away, and no number that an apply would reset."""
    if "router" not in names(target, "Deployment"):
        assert target == "overlays/gateway"
        return
    (scaler,) = of_kind(target, "HorizontalPodAutoscaler")
    assert scaler["spec"]["minReplicas"] >= 2
    scaled = {scaler["spec"]["scaleTargetRef"]["name"]} | {
        found["spec"]["scaleTargetRef"]["name"] for found in of_kind(target, "ScaledObject")
    }
    for found in of_kind(target, "Deployment"):
        assert ("replicas" in found["spec"]) == (found["metadata"]["name"] not in scaled)
    assert scaled <= names(target, "Deployment")


def test_what_is_watched_is_there(target: str) -> None:
    """Each ServiceMonitor finds Services, at a port that they have."""
    for monitor in of_kind(target, "ServiceMonitor"):
        selector = monitor["spec"]["selector"]["matchLabels"]
        found = [
            service
            for service in of_kind(target, "Service")
            if selects(selector, service["metadata"]["labels"])
        ]
        assert found
        for service in found:
            assert "http" in {port["name"] for port in service["spec"]["ports"]}
