"""deploy/compose/: files are valid and hardened; the router runs before hosts of their own."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.tools import DEPLOY, ROOT, run_tool
from vllm_rvec.loader.config import LoaderConfig
from vllm_rvec.router import load_route_config

COMPOSE = DEPLOY / "compose"
FILES = ("compose.yaml", "compose.cpu.yaml", "compose.gpu.yaml")
ENGINES = {"dial": "dial", "base": "ab", "enhanced": "ab"}
"""Each engine's profile."""
SCRIPT = COMPOSE / "with-secrets.sh"


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((COMPOSE / name).read_text())
    return loaded


SERVICES: dict[str, dict[str, Any]] = read("compose.yaml")["services"]


def command_of(engine: str) -> list[str]:
    return [str(word) for word in SERVICES[engine]["command"]]


def flag(command: list[str], name: str) -> str:
    (found,) = [word for word in command if word.startswith(f"--{name}=")]
    return found.partition("=")[2]


def names_of(command: list[str]) -> list[str]:
    """What an engine answers to."""
    found = re.search(r"--served-model-name[= ]((?:[^-\s]\S*\s?)+)", " ".join(command))
    assert found is not None
    return found.group(1).split()


@pytest.mark.parametrize("name", FILES)
def test_files_are_compose_files(name: str) -> None:
    """By the specification's own schema."""
    done = run_tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE / name)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_is_hardened(service: str) -> None:
    """No capability, no way to more, little to write to; restarted, and asked for its health."""
    settings = SERVICES[service]
    assert settings["cap_drop"] == ["ALL"]
    assert settings["security_opt"] == ["no-new-privileges:true"]
    assert settings["read_only"] is True
    assert settings["restart"] == "unless-stopped"
    assert settings["healthcheck"]["test"][0] == "CMD"
    assert "privileged" not in settings
    for mount in settings["volumes"]:
        assert mount["type"] == "volume" or mount["read_only"]
    for port in settings.get("ports", []):
        assert "127.0.0.1:" in port


@pytest.mark.parametrize("hardware", ["cpu", "gpu"])
def test_every_service_has_an_image_of_a_version(hardware: str) -> None:
    """And ours are built by the Dockerfile's targets."""
    override = read(f"compose.{hardware}.yaml")["services"]
    assert set(override) == set(ENGINES)
    dockerfile = (DEPLOY / "docker" / "Dockerfile").read_text()
    for name, settings in SERVICES.items():
        merged = settings | override.get(name, {})
        assert re.search(r":v?\d+\.\d+\.\d+$", merged["image"])
        if "build" in merged:
            assert re.search(rf"^FROM .* AS {merged['build']['target']}$", dockerfile, re.MULTILINE)


def test_keys_are_secrets_and_nothing_else() -> None:
    """Files that make-secrets.sh writes; none stands in a command, a variable or a file here."""
    secrets = read("compose.yaml")["secrets"]
    script = (COMPOSE / "make-secrets.sh").read_text()
    assert all(name in script for name in secrets)
    assert all(given["file"] == f"./secrets/{name}" for name, given in secrets.items())
    for settings in SERVICES.values():
        assert not [name for name in settings.get("environment", {}) if name.endswith("_KEY")]
    assert "--api-key" not in (COMPOSE / "compose.yaml").read_text()


def test_engines_are_reached_by_router_and_prometheus_only() -> None:
    """They are on a network without a way out, and publish nothing."""
    assert read("compose.yaml")["networks"]["engines"] == {"internal": True}
    for engine in ENGINES:
        assert SERVICES[engine]["networks"] == ["engines"]
        assert "ports" not in SERVICES[engine]
    there = {name for name, settings in SERVICES.items() if "engines" in settings["networks"]}
    assert there - set(ENGINES) == {"router-dial", "router-ab", "prometheus"}


def test_prometheus_asks_the_services_that_there_are() -> None:
    """By their names and aliases."""
    jobs = yaml.safe_load((DEPLOY / "monitoring" / "prometheus.yaml").read_text())["scrape_configs"]
    asked = {name for job in jobs for found in job["dns_sd_configs"] for name in found["names"]}
    aliases = {
        alias
        for settings in SERVICES.values()
        if isinstance(settings["networks"], dict)
        for alias in settings["networks"]["engines"]["aliases"]
    }
    assert asked == set(ENGINES) | aliases


@pytest.mark.parametrize("profile", ["ab", "dial"])
def test_the_router_asks_the_engines_of_its_profile(
    profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With their key, and before the containers are killed requests have ended."""
    monkeypatch.setenv("ENGINE_KEY", "any")
    config = load_route_config(COMPOSE / f"route.{profile}.yaml")
    upstreams = [one for given in config.variants.values() for one in given.upstreams or ()]
    if config.dial is not None:
        upstreams += config.dial.upstreams
    expected = {f"http://{name}:8000" for name, its in ENGINES.items() if its == profile}
    assert {upstream.url.rstrip("/") for upstream in upstreams} == expected
    assert {upstream.api_key_env for upstream in upstreams} == {"ENGINE_KEY"}
    router = SERVICES[f"router-{profile}"]
    assert router["profiles"] == [profile]
    assert int(router["stop_grace_period"].rstrip("s")) > config.drain_seconds
    assert config.results is not None
    writable = [mount["target"] for mount in router["volumes"] if mount["type"] == "volume"]
    assert str(Path(config.results.path).parent) in writable


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_load_the_vector_and_know_their_names(engine: str) -> None:
    """The loader takes their options; each fused one knows whatever clients may call it."""
    command = command_of(engine)
    options = LoaderConfig.model_validate(json.loads(flag(command, "model-loader-extra-config")))
    config = load_route_config(COMPOSE / f"route.{ENGINES[engine]}.yaml")
    if engine == "dial":
        assert options.mode == "dial"
        assert {name: variant.alpha for name, variant in config.variants.items()} == {
            "base": 0,
            "enhanced@1": 1,
        }
        assert names_of(command) == ["base"]
    else:
        own = names_of(command)[0]
        assert config.variants[own].alpha == options.alpha
        assert set(names_of(command)) == set(config.variants) | set(config.aliases)
    grace = int(SERVICES[engine]["stop_grace_period"].rstrip("s"))
    assert grace > int(flag(command, "shutdown-timeout"))


def test_keys_get_from_files_into_the_environment(tmp_path: Path) -> None:
    """Those that are named as variables, without the line's end; others are left alone."""
    (tmp_path / "VLLM_API_KEY").write_text("sesame $HOME `x`\n")
    (tmp_path / "grafana_password").write_text("hidden")
    program = "import json, os; print(json.dumps(dict(os.environ)))"
    words = [str(SCRIPT), sys.executable, "-c", program]
    env = os.environ | {"SECRETS_DIR": str(tmp_path)}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    assert seen["VLLM_API_KEY"] == "sesame $HOME `x`"
    assert "hidden" not in seen.values()
    assert not {"file", "name", "value"} & set(seen)


def test_an_empty_key_ends_the_start(tmp_path: Path) -> None:
    """A container that asks for no key would be worse."""
    (tmp_path / "VLLM_API_KEY").write_text("\n")
    env = {"SECRETS_DIR": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run([SCRIPT, "true"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "VLLM_API_KEY is empty" in done.stderr


def test_secrets_are_made_once(tmp_path: Path) -> None:
    """Long, random; only their owner enters the folder, containers' users read the files."""
    script = tmp_path / "make-secrets.sh"
    script.write_bytes((COMPOSE / "make-secrets.sh").read_bytes())
    made = []
    for _ in range(2):
        subprocess.run(["sh", script], check=True)
        made.append({file.name: file.read_text() for file in (tmp_path / "secrets").iterdir()})
    assert made[0] == made[1]
    assert set(made[0]) == set(read("compose.yaml")["secrets"])
    assert len(set(made[0].values())) == len(made[0])
    assert all(re.fullmatch(r"[0-9a-f]{64}", key) for key in made[0].values())
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    assert all(stat.S_IMODE(f.stat().st_mode) == 0o444 for f in (tmp_path / "secrets").iterdir())


def test_the_router_before_two_hosts(tmp_path: Path) -> None:
    """Each engine in a network of its own: keys, split, and a host that vanishes."""
    unshare = ["unshare", "-Urnm"]
    able = subprocess.run(
        [*unshare, "ip", "link", "add", "one", "type", "veth", "peer", "name", "two"],
        capture_output=True,
        check=False,
    )
    if able.returncode:
        pytest.skip("no network namespaces here")
    done = subprocess.run(
        [*unshare, sys.executable, "-m", "tests.deploy.hosts", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "base": {"status": 200, "reason": "explicit", "who": "base"},
        "enhanced@1": {"status": 200, "reason": "explicit", "who": "enhanced"},
        "split": ["base", "enhanced"],
        "stranger": 401,
        "without its host": {"status": 200, "reason": "fallback", "who": "base"},
    }
    assert "of-clients" not in done.stderr
    assert "of-engines" not in done.stderr
