"""deploy/docker/: what can be known of a Dockerfile without a daemon."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch

from tests.deploy.tools import DEPLOY, ROOT, run_tool
from vllm_rvec import __version__

DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
TEXT = DOCKERFILE.read_text()
TARGETS = ("router", "engine", "engine-cpu")


def stage(name: str) -> str:
    """Return one stage's lines, joined where they go on."""
    parts = re.split(r"^FROM ", TEXT.replace("\\\n", " "), flags=re.MULTILINE)
    (found,) = [part for part in parts if re.match(rf"\S+ AS {name}\n", part)]
    return found


def test_hadolint_finds_nothing() -> None:
    """But for what a comment beside the line answers."""
    done = run_tool("hadolint", DOCKERFILE)
    assert done.returncode == 0, done.stdout


def test_bases_are_pinned() -> None:
    """With their registry and an exact version; the engine's is the one that is tested with."""
    bases = dict(re.findall(r"^ARG (\w+_IMAGE)=(\S+)$", TEXT, re.MULTILINE))
    assert all(
        re.fullmatch(r"docker\.io/[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*", base) for base in bases.values()
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (gpu,) = project["optional-dependencies"]["gpu"]
    assert fnmatch(bases["VLLM_IMAGE"].partition(":v")[2], gpu.partition("==")[2])
    used = re.findall(r"^FROM (\S+)", TEXT, re.MULTILINE)
    assert set(used) == {f"${{{name}}}" for name in bases}


def test_images_are_labelled_unprivileged_and_watched() -> None:
    """A user by number, who comes last; a health check without a shell; the package's version."""
    for name in TARGETS:
        text = stage(name)
        assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] == "10001:10001"
        assert "useradd --uid 10001 " in text
        assert re.search(r"^HEALTHCHECK .*CMD \[", text, re.MULTILINE)
        assert f"ARG VERSION={__version__}\n" in text
        for label in ("title", "description", "licenses", "version", "revision"):
            assert f"org.opencontainers.image.{label}=" in text


def test_what_is_copied_is_there_and_let_in() -> None:
    """Each source of a COPY exists, and the ignore file does not keep it out."""
    lines = re.findall(r"^COPY (?!--from)(.+)$", TEXT, re.MULTILINE)
    sources = [source for line in lines for source in line.split()[:-1]]
    ignore = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignore
    let_in = {line[1:] for line in ignore if line.startswith("!")}
    for source in sources:
        assert (ROOT / source).exists()
        assert source.partition("/")[0] in let_in
    assert {source.partition("/")[0] for source in sources} == let_in


def test_the_wheels_build_tools_are_in_the_lock() -> None:
    """The build is without isolation, and so has what that line installs and nothing else."""
    (pattern,) = re.findall(r"grep -E '([^']+)'", TEXT)
    lock = (ROOT / "requirements" / "cpu.txt").read_text()
    names = {line.partition("==")[0] for line in lock.splitlines() if re.match(pattern, line)}
    assert names == {"hatchling", "packaging", "pathspec", "pluggy", "trove-classifiers"}


def test_the_readme_builds_every_target() -> None:
    """And no other."""
    readme = (DOCKERFILE.parent / "README.md").read_text()
    assert set(re.findall(r"--target (\S+)", readme)) == set(TARGETS)
