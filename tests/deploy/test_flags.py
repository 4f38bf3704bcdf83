"""Flags in deploy/'s files and documents are flags of the installed vLLM, by its own parser."""

from __future__ import annotations

import json
import re
import shlex

import yaml

from tests.deploy.flags import server_flags
from tests.deploy.tools import DEPLOY

COMPOSE = DEPLOY / "compose"
HARDWARE = ("cpu", "gpu")


def compose_commands() -> list[list[str]]:
    """Each engine's, with the flags of each kind of hardware."""
    services = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]
    engines = [services[name] for name in ("dial", "base", "enhanced")]
    found = []
    for hardware in HARDWARE:
        override = yaml.safe_load((COMPOSE / f"compose.{hardware}.yaml").read_text())["services"]
        (mount,) = override["dial"]["volumes"]
        for engine in engines:
            *_, flag, path = engine["entrypoint"]
            assert (flag, path) == ("--config", mount["target"])
            found.append([flag, str(COMPOSE / mount["source"]), *engine["command"]])
    return found


def documented_commands() -> list[list[str]]:
    """Of ray/README.md: vLLM over several nodes."""
    text = (DEPLOY / "ray" / "README.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^vllm serve (.*)$", text, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def ray_commands() -> list[list[str]]:
    """Engine keywords of each variant, as the flags that they stand for."""
    (application,) = yaml.safe_load((DEPLOY / "ray" / "serve.yaml").read_text())["applications"]
    found = []
    for config in application["args"]["llm_configs"]:
        words = [config["model_loading_config"]["model_source"]]
        for name, value in config["engine_kwargs"].items():
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            words.append(f"--{name.replace('_', '-')}={text}")
        found.append(words)
    return found


def test_compose() -> None:
    """Every engine loads with the vector, listens for its network, and drains."""
    commands = compose_commands()
    assert len(commands) == 6
    for engine in map(server_flags, commands):
        assert engine.load_format == "rvec"
        assert (engine.host, engine.port) == ("0.0.0.0", 8000)
        assert engine.shutdown_timeout == 30
        assert engine.model == "/models/target"
        vector = engine.model_loader_extra_config
        assert isinstance(vector, dict)
        assert vector["vector"] == "/models/vector"


def test_several_nodes() -> None:
    """One world of sixteen ranks; one node answers, one works; or Ray has both."""
    first, second, with_ray = map(server_flags, documented_commands())
    for engine in (first, second, with_ray):
        assert engine.tensor_parallel_size * engine.pipeline_parallel_size == 16
    assert (first.nnodes, first.node_rank, first.headless) == (2, 0, False)
    assert (second.nnodes, second.node_rank, second.headless) == (2, 1, True)
    assert first.master_addr == second.master_addr
    assert with_ray.distributed_executor_backend == "ray"


def test_ray() -> None:
    """Each keyword is an argument of the engine."""
    engines = map(server_flags, ray_commands())
    assert [engine.model_loader_extra_config["alpha"] for engine in engines] == [0, 1]
