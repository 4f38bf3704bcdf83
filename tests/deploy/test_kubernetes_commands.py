"""deploy/kubernetes: every command line is one that its program takes, and what they say agrees."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from tests.deploy.exported import vllm_metrics
from tests.deploy.flags import server_flags
from tests.deploy.rendered import (
    TARGETS,
    Object,
    Pod,
    command_line,
    environment,
    named,
    of_kind,
    pods,
    selects,
)
from vllm_rvec.cli.main import app
from vllm_rvec.loader.config import LoaderConfig
from vllm_rvec.router import RouteConfig, load_route_config

if TYPE_CHECKING:
    import argparse

ROUTED = [target for target in TARGETS if target != "overlays/gateway"]
SERVER = ["python3", "-m", "vllm.entrypoints.openai.api_server"]
RUN = CliRunner()


def engines(target: str) -> list[tuple[Pod, Object]]:
    """Find the engines' own containers."""
    found = ((pod, c) for pod in pods(target) for c in pod.spec["containers"])
    return [(pod, c) for pod, c in found if c["name"] == "engine"]


def parsed(target: str, container: Object) -> argparse.Namespace:
    """Read an engine's flags as vLLM does, which refuses those that it doesn't have."""
    words = command_line(target, container)
    flags = words[3:] if words[:3] == SERVER else words[2:]
    assert words[: -len(flags)] in (SERVER, ["vllm", "serve"])
    return server_flags(flags)


def route_of(target: str, folder: Path) -> RouteConfig:
    """Read the router's file as it arrives in its Pod."""
    path = folder / "route.yaml"
    path.write_text(named(target, "ConfigMap", "route")["data"]["route.yaml"])
    return load_route_config(path, {})


@pytest.mark.parametrize("target", TARGETS)
def test_vllm_takes_the_engines_flags(target: str) -> None:
    """By its own parser; and the loader takes its own options."""
    found = engines(target)
    assert found
    for pod, container in found:
        flags = parsed(target, container)
        model = flags.model_tag or flags.model
        variables = environment(target, container)
        assert model == f"/weights/targets/{variables['TARGET_REVISION']}"
        assert flags.load_format == "rvec"
        options, rest = LoaderConfig.split(flags.model_loader_extra_config)
        assert not rest
        (vector,) = options.recipe
        assert vector.path == f"/weights/vllm_rvec/vectors/{variables['VECTOR_BLAKE3']}"
        if not flags.headless:
            assert flags.port == 8000
            grace = pod.spec["terminationGracePeriodSeconds"]
            before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
            assert grace >= before + flags.shutdown_timeout + 10 > before + 30


@pytest.mark.parametrize("target", TARGETS)
def test_our_commands_take_theirs(target: str) -> None:
    """Options that a command doesn't have end it with 2; the router's file is what it reads."""
    ours = [c for pod in pods(target) for c in pod.containers if c["image"].find("/router:") > 0]
    commands = {tuple(command_line(target, c)) for c in ours if "command" not in c}
    heads = {words[0] for words in commands}
    assert heads == ({"route", "fetch"} if target in ROUTED else {"fetch"})
    for words in commands:
        assert RUN.invoke(app, [*words, "--help"]).exit_code == 0
        assert RUN.invoke(app, [*words, "--no-such-flag"]).exit_code == 2


@pytest.mark.parametrize("target", TARGETS)
def test_weights_are_pinned_where_they_come_from(target: str) -> None:
    """The target by commit, the vector by digest; both come to where the engine looks for them."""
    for pod in pods(target):
        for container in pod.spec.get("initContainers", []):
            words = command_line(target, container)
            variables = environment(target, container)
            assert re.fullmatch(r"[0-9a-f]{40}", variables["TARGET_REVISION"])
            assert re.fullmatch(r"[0-9a-f]{64}", variables["VECTOR_BLAKE3"])
            if container["name"] == "vector":
                assert words[1].endswith(f"#blake3={variables['VECTOR_BLAKE3']}")
                assert variables["XDG_CACHE_HOME"] == "/weights"
            else:
                assert words[:2] == ["hf", "download"]
                assert f"--revision={variables['TARGET_REVISION']}" in words
                assert f"--local-dir=/weights/targets/{variables['TARGET_REVISION']}" in words


@pytest.mark.parametrize("target", ROUTED)
def test_the_routers_file_is_right(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By our own check, with the key that its Secret brings; and its drain fits the Pod's grace."""
    monkeypatch.setenv("VLLM_RVEC_API_KEY", "k")
    config = route_of(target, tmp_path)
    checked = RUN.invoke(app, ["check-config", str(tmp_path / "route.yaml")])
    assert checked.exit_code == 0, checked.output
    (pod,) = [p for p in pods(target) if p.name == "router"]
    (container,) = pod.containers
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod.spec["terminationGracePeriodSeconds"] >= before + config.drain_seconds + 10
    assert config.port == container["ports"][0]["containerPort"]
    variables = {variable["name"] for variable in container["env"]}
    upstreams = [u for v in config.variants.values() for u in v.upstreams or []]
    upstreams += config.dial.upstreams if config.dial else []
    assert {u.api_key_env for u in upstreams} <= variables
    if config.results is not None:
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert str(Path(config.results.path).parent) in mounts


@pytest.mark.parametrize("target", ROUTED)
def test_routers_and_engines_agree(target: str, tmp_path: Path) -> None:
    """Each upstream is an engine's Service; the engine has the variant's alpha and its names."""
    config = route_of(target, tmp_path)
    by_service = engines_by_service(target)
    reached = set()
    for name, variant in config.variants.items():
        for upstream in variant.upstreams or []:
            service = service_of(str(upstream.url))
            reached.add(service)
            flags = parsed(target, by_service[service])
            assert flags.served_model_name[0] == name
            assert names_asked_of(name, config) <= set(flags.served_model_name)
            assert flags.model_loader_extra_config["alpha"] == variant.alpha
    if config.dial is not None:
        (upstream,) = config.dial.upstreams
        service = service_of(str(upstream.url))
        reached.add(service)
        options = parsed(target, by_service[service]).model_loader_extra_config
        assert options["variants"] == {name: v.alpha for name, v in config.variants.items()}
        assert tuple(options["alpha_range"]) == tuple(config.dial.alpha_range)
    assert reached == by_service.keys()


def names_asked_of(variant: str, config: RouteConfig) -> set[str]:
    """What requests may say as `model` that come to a variant."""
    aliases = {alias for alias, said in config.aliases.items() if variant in said.split}
    return {variant, *aliases} | {n for n, v in config.variants.items() if v.fallback == variant}


def service_of(url: str) -> str:
    found = re.fullmatch(r"http://([a-z0-9-]+):8000/?", url)
    assert found
    return found[1]


def engines_by_service(target: str) -> dict[str, Object]:
    """Find the container behind each Service of an engine."""
    found: dict[str, Object] = {}
    for service in of_kind(target, "Service"):
        selector: dict[str, Any] = service["spec"]["selector"]
        for pod, container in engines(target):
            if selects(selector, pod.labels):
                found[service["metadata"]["name"]] = container
    return found


def test_a_groups_ranks_differ_in_nothing_but_their_place() -> None:
    """Leader and worker, and what only one that answers HTTP has."""
    group = [c for _, c in engines("overlays/multinode")]
    flags = [vars(parsed("overlays/multinode", container)) for container in group]
    different = {name for name in flags[0] if flags[0][name] != flags[1][name]}
    assert different == {
        "headless",
        "host",
        "shutdown_timeout",
        "served_model_name",
        "disable_access_log_for_endpoints",
    }
    size = flags[0]["tensor_parallel_size"] * flags[0]["pipeline_parallel_size"]
    gpus = int(group[0]["resources"]["limits"]["nvidia.com/gpu"])
    assert size == flags[0]["nnodes"] * gpus
    found = of_kind("overlays/multinode", "LeaderWorkerSet")[0]["spec"]["leaderWorkerTemplate"]
    assert found["size"] == flags[0]["nnodes"]


def test_the_gateway_knows_the_engines() -> None:
    """Each backend is an engine's Service, and answers to the alias."""
    target = "overlays/gateway"
    by_service = engines_by_service(target)
    (route,) = of_kind(target, "HTTPRoute")
    backends = [b for rule in route["spec"]["rules"] for b in rule["backendRefs"]]
    assert {backend["name"] for backend in backends} == by_service.keys()
    for container in by_service.values():
        assert route["metadata"]["name"] in parsed(target, container).served_model_name


def test_the_dial_is_started_as_serve_starts_it() -> None:
    """The parts of vLLM that it replaces, and the model runner that it works with."""
    from vllm_rvec.serve.plan import DIAL_ENVIRONMENT, DIAL_MIDDLEWARE, DIAL_PARTS, DIAL_PROCESSOR

    ((_, container),) = engines("overlays/dial")
    flags = parsed("overlays/dial", container)
    assert {n: getattr(flags, n.replace("-", "_")) for n in DIAL_PARTS} == DIAL_PARTS
    assert flags.logits_processors == [DIAL_PROCESSOR]
    assert flags.middleware == [DIAL_MIDDLEWARE]
    assert DIAL_ENVIRONMENT.items() <= environment("overlays/dial", container).items()


def test_the_scaler_asks_for_what_vllm_counts() -> None:
    """The metric is one that the installed vLLM has; the Service is the scaled engine's."""
    (scaled,) = of_kind("overlays/keda", "ScaledObject")
    query = scaled["spec"]["triggers"][0]["metadata"]["query"]
    (metric,) = re.findall(r"vllm:\w+", query)
    assert metric in vllm_metrics()
    (service,) = re.findall(r'service="([^"]+)"', query)
    assert service in engines_by_service("overlays/keda")
    assert scaled["spec"]["scaleTargetRef"]["name"] == service


def test_loader_options_are_json_with_an_alpha_of_a_number() -> None:
    """Also where alpha comes from a variable."""
    for _, container in engines("overlays/ab"):
        (word,) = [w for w in command_line("overlays/ab", container) if "extra-config" in w]
        assert isinstance(json.loads(word.partition("=")[2])["alpha"], int | float)
