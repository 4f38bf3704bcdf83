"""deploy/kubernetes: everything renders, and every object is what its kind says it may be."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from pydantic import ValidationError

from tests.deploy.custom_kinds import CUSTOM, KINDS
from tests.deploy.prometheus_rule import FILE, prometheus_rule
from tests.deploy.rendered import KUBERNETES, TARGETS, named, objects, pods, rendered_text
from tests.deploy.tools import DEPLOY, run_tool

if TYPE_CHECKING:
    from pathlib import Path

OVERLAYS = {"dial", "ab", "canary", "multinode", "keda", "gateway", "monitoring"}
UNKNOWN = re.compile(r"^WARN .*Couldn't find schema for kind (\w+) ", re.MULTILINE)


def validate(folder: Path, documents: dict[str, str]) -> str:
    """Have files validated strictly against Kubernetes' own schemas; returns all that was said."""
    for name, text in documents.items():
        (folder / f"{name}.yaml").write_text(text)
    done = run_tool("kubernetes-validate", "--strict", *sorted(folder.glob("*.yaml")))
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def test_the_overlays_are_those_that_are_documented() -> None:
    """Each has its line in the README there."""
    assert {target.partition("/")[2] for target in TARGETS if "/" in target} == OVERLAYS
    readme = (KUBERNETES / "README.md").read_text()
    assert not [name for name in OVERLAYS if f"`{name}`" not in readme]


def test_an_overlay_of_ones_own_renders(tmp_path: Path) -> None:
    """The README's, to the letter: its names, and its patches of every engine, take hold."""
    (example,) = re.findall(r"```yaml\n(.*?)```", (KUBERNETES / "README.md").read_text(), re.DOTALL)
    (tmp_path / "vllm_rvec").symlink_to(DEPLOY.parent)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kustomization.yaml").write_text(example)
    done = run_tool("kubectl", "kustomize", tmp_path / "mine")
    assert done.returncode == 0, done.stderr
    assert "registry.example.com" not in done.stdout
    found = list(yaml.safe_load_all(done.stdout))
    engines = [
        one["spec"]["template"]["spec"]["containers"][0]
        for one in found
        if one["kind"] == "Deployment" and one["metadata"]["name"].startswith("engine-")
    ]
    assert len(engines) == 2
    for engine in engines:
        assert engine["args"][:2] == [
            "--tensor-parallel-size=4",
            "--model=/weights/targets/$(TARGET_REVISION)",
        ]
        assert engine["resources"]["limits"]["nvidia.com/gpu"] == "4"
    (claim,) = [one for one in found if one["kind"] == "PersistentVolumeClaim"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "500Gi"
    watched = [one for one in found if one["apiVersion"].startswith("monitoring.coreos.com/")]
    assert [one["metadata"]["labels"]["release"] for one in watched] == ["prometheus"] * 3
    validate(tmp_path, {"mine": done.stdout})


def test_every_object_fits_its_schema(tmp_path: Path) -> None:
    """A kind without a schema is a failure, unless it has one here."""
    said = validate(tmp_path, {t.replace("/", "-"): rendered_text(t) for t in TARGETS})
    assert set(UNKNOWN.findall(said)) == KINDS
    assert len(re.findall(r" passed for resource ", said)) == sum(
        found["kind"] not in KINDS for target in TARGETS for found in objects(target)
    )


def test_a_wrong_field_is_noticed(tmp_path: Path) -> None:
    """The validator that the test above trusts does refuse."""
    wrong = rendered_text("base").replace("failureThreshold:", "failureTreshold:", 1)
    with pytest.raises(AssertionError, match="failureTreshold"):
        validate(tmp_path, {"wrong": wrong})


def test_pods_of_other_kinds_fit_the_schema_of_a_pod(tmp_path: Path) -> None:
    """LeaderWorkerSet's own definition takes any."""
    found = {
        pod.name: yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": pod.name, "labels": dict(pod.labels)},
                "spec": pod.spec,
            }
        )
        for pod in pods("overlays/multinode")
    }
    assert len(found) == 3
    assert "WARN" not in validate(tmp_path, found)


@pytest.mark.parametrize("target", TARGETS)
def test_kinds_of_others_have_the_fields_that_those_define(target: str) -> None:
    """Checked by types of our own."""
    for found in objects(target):
        if found["kind"] in KINDS:
            CUSTOM.validate_python(found)


def test_a_wrong_field_of_such_a_kind_is_noticed() -> None:
    """The types do refuse."""
    wrong: dict[str, Any] = {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": "a", "namespace": "b"},
        "spec": {"minReplicas": 1},
    }
    with pytest.raises(ValidationError, match="minReplicas"):
        CUSTOM.validate_python(wrong)


def test_the_monitoring_overlay_has_the_rules_and_the_dashboard() -> None:
    """Those of deploy/monitoring, to the letter: else `python -m tests.deploy.prometheus_rule`."""
    assert FILE.read_text() == prometheus_rule()
    rule = named("overlays/monitoring", "PrometheusRule", "vllm-rvec")
    assert rule["spec"] == yaml.safe_load((DEPLOY / "monitoring" / "rules.yaml").read_text())
    shown = named("overlays/monitoring", "ConfigMap", "dashboard")["data"]
    assert shown == {"dashboard.json": (DEPLOY / "monitoring" / "dashboard.json").read_text()}
