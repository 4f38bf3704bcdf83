"""deploy/ray/: both forms of the configuration are one, fit the loader, and run on a local Ray."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.tools import DEPLOY, ROOT, pins, run_tool
from tests.integration.conftest import DEMO
from vllm_rvec.loader.config import LoaderConfig

FOLDER = DEPLOY / "ray"
ENVIRONMENT = Path(os.environ.get("RAY_ENV", ROOT / ".venv-ray"))
QUESTIONS = 12
SECONDS = 900
"""Two engines and Ray's own processes took 230 s on two cores, 400 s on busy ones."""


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return loaded


def configs() -> list[dict[str, Any]]:
    (application,) = read("serve.yaml")["applications"]
    assert application["import_path"] == "ray.serve.llm:build_openai_app"
    found: list[dict[str, Any]] = application["args"]["llm_configs"]
    return found


def pods() -> dict[str, dict[str, Any]]:
    """Of the cluster that the manifest asks for."""
    cluster = read("rayservice.yaml")["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    specs = [group["template"]["spec"] for group in groups]
    return {spec["containers"][0]["name"]: spec for spec in specs}


def test_the_manifest_has_the_configuration_word_for_word() -> None:
    """So that what is tested is what KubeRay applies."""
    assert read("rayservice.yaml")["spec"]["serveConfigV2"] == (FOLDER / "serve.yaml").read_text()


def test_each_variant_is_an_engine_fused_at_its_alpha() -> None:
    """By our load format; names and alphas agree."""
    alphas = {}
    for config in configs():
        engine = config["engine_kwargs"]
        assert engine["load_format"] == "rvec"
        options = LoaderConfig.model_validate(engine["model_loader_extra_config"])
        assert options.mode == "fused"
        alphas[config["model_loading_config"]["model_id"]] = options.alpha
    assert alphas == {"base": 0, "enhanced@1": 1}


def test_versions_are_those_of_the_lock() -> None:
    """Of the cluster, of what the image installs, and of what ran."""
    lock = pins("ray.txt")
    assert read("rayservice.yaml")["spec"]["rayClusterConfig"]["rayVersion"] == lock["ray"]
    assert f"Ray Serve LLM {lock['ray']}" in (FOLDER / "README.md").read_text()
    assert not lock.keys() & pins("cpu.txt").keys()


@pytest.mark.parametrize("pod", ["head", "worker"])
def test_pods_are_restricted(pod: str) -> None:
    """Non-root, no token, no capability, resources, the weights read-only."""
    spec = pods()[pod]
    assert spec["automountServiceAccountToken"] is False
    taints = [taint["key"] for taint in spec.get("tolerations", [])]
    assert taints == (["nvidia.com/gpu"] if pod == "worker" else [])
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert (
        container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
    )
    assert not container["image"].endswith("latest")
    volumes = {volume["name"] for volume in spec["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    weights = [mount for mount in container["volumeMounts"] if mount["name"] == "weights"]
    assert [mount["readOnly"] for mount in weights] == [True]


def test_pods_are_kubernetes_own(tmp_path: Path) -> None:
    """Strictly by its schemas, which don't know the kind around them."""
    for name, spec in pods().items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(pod))
    done = run_tool("kubernetes-validate", "--strict", *sorted(tmp_path.iterdir()))
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_replica_finds_a_gpu() -> None:
    """As many workers as variants have replicas at least, at one GPU each."""
    (group,) = read("rayservice.yaml")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    least = sum(
        config["deployment_config"]["autoscaling_config"]["min_replicas"]
        * config["engine_kwargs"]["tensor_parallel_size"]
        for config in configs()
    )
    assert pods()["worker"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert group["minReplicas"] == group["replicas"] == least
    # More would never come: nothing but Ray's autoscaler adds workers.
    assert group["maxReplicas"] == least


def test_the_dockerfile_is_sound() -> None:
    """By hadolint; and it has what KubeRay's own probes of a worker are made with."""
    done = run_tool("hadolint", FOLDER / "Dockerfile")
    assert not done.stdout + done.stderr
    assert "install --yes --no-install-recommends wget" in (FOLDER / "Dockerfile").read_text()


@pytest.mark.engine
@pytest.mark.timeout(SECONDS + 60)
def test_ray_serves_both_variants(tmp_path: Path) -> None:
    """On a local Ray: each answers under its own name, and the vector is in one of them only."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        pytest.skip(f"Ray is not in {ENVIRONMENT}: make ray")
    problems = [json.loads(line) for line in (DEMO / "questions.jsonl").read_text().splitlines()]
    asked = problems[:QUESTIONS]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
    script = Path(__file__).with_name("ray_serve.py")
    done = subprocess.run(
        [str(python.absolute()), str(script), port, *(one["question"] for one in asked)],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
        env={
            **os.environ,
            "PATH": f"{python.parent.absolute()}:{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            # A local Ray of our own, wherever another one may be.
            "RAY_ADDRESS": "local",
        },
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"base"')]
    right = {}
    for name, answers in json.loads(line).items():
        assert {answer["model"] for answer in answers} == {name}
        ends = zip(answers, asked, strict=True)
        right[name] = sum(a["content"].split()[-1:] == [one["answer"]] for a, one in ends)
    assert right["enhanced@1"] > right["base"]
