"""deploy/kubernetes as a cluster gets it: what kubectl renders, and the Pods in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml

from tests.deploy.tools import DEPLOY, run_tool

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

KUBERNETES = DEPLOY / "kubernetes"
TARGETS = ("base", *sorted(f"overlays/{path.name}" for path in KUBERNETES.glob("overlays/*")))
"""What users apply, each complete."""

GROUP_VARIABLES = {
    "LWS_GROUP_SIZE": "2",
    "LWS_WORKER_INDEX": "1",
    "LWS_LEADER_ADDRESS": "engine-group-enhanced-1-0.engine-group-enhanced-1.vllm-rvec",
}
"""What LeaderWorkerSet adds to each container's environment."""

Object: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A Pod to be, as a workload describes it.

    Attributes:
        name: The workload's, and of which template.
        labels: The Pod's.
        spec: The Pod's.
    """

    name: str
    labels: Mapping[str, str]
    spec: Object

    @property
    def containers(self) -> list[Object]:
        """All, those of the start first."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


@cache
def rendered_text(target: str) -> str:
    """Render one."""
    done = run_tool("kubectl", "kustomize", KUBERNETES / target)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "kubectl warns"
    return done.stdout


@cache
def objects(target: str) -> tuple[Object, ...]:
    """Return all objects of one."""
    return tuple(yaml.safe_load_all(rendered_text(target)))


def of_kind(target: str, kind: str) -> list[Object]:
    """Return those of one kind."""
    return [found for found in objects(target) if found["kind"] == kind]


def named(target: str, kind: str, name: str) -> Object:
    """Return the one of that kind and name."""
    (found,) = [o for o in of_kind(target, kind) if o["metadata"]["name"] == name]
    return found


def pods(target: str) -> Iterator[Pod]:
    """Find the Pods of all workloads."""
    for found in objects(target):
        name = found["metadata"]["name"]
        for key, template in _templates(found).items():
            yield Pod(f"{name}{key}", template["metadata"]["labels"], template["spec"])


def _templates(found: Object) -> dict[str, Object]:
    match found["kind"]:
        case "Deployment" | "StatefulSet" | "DaemonSet" | "Job":
            return {"": found["spec"]["template"]}
        case "LeaderWorkerSet":
            group = found["spec"]["leaderWorkerTemplate"]
            added = {"leaderworkerset.sigs.k8s.io/name": found["metadata"]["name"]}
            return {
                f".{role}": _with_labels(
                    group[f"{role}Template"],
                    {**added, "leaderworkerset.sigs.k8s.io/worker-index": i},
                )
                for role, i in (("leader", "0"), ("worker", "1"))
            }
    return {}


def _with_labels(template: Object, added: Mapping[str, str]) -> Object:
    metadata = template["metadata"]
    return {**template, "metadata": {**metadata, "labels": {**metadata["labels"], **added}}}


def environment(target: str, container: Object) -> dict[str, str]:
    """Return a container's variables whose values are known before it runs."""
    found = dict(GROUP_VARIABLES)
    for source in container.get("envFrom", []):
        if reference := source.get("configMapRef"):
            found |= named(target, "ConfigMap", reference["name"])["data"]
    return found | {e["name"]: e["value"] for e in container.get("env", []) if "value" in e}


def command_line(target: str, container: Object) -> list[str]:
    """Return a container's words as it gets them: each $(NAME) in its place."""
    variables = environment(target, container)
    words = [*container.get("command", []), *container.get("args", [])]
    return [re.sub(r"\$\((\w+)\)", lambda m: variables[m[1]], word) for word in words]


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Tell whether labels have all that a selector asks for."""
    return bool(selector) and selector.items() <= labels.items()
