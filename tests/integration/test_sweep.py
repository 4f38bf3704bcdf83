"""A sweep with real engines: of an address that serves, and of an engine that is killed midway."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.integration.conftest import DEMO
from tests.support.processes import engine_processes, until
from vllm_rvec.evaluation.answers import ANSWERS_NAME, read_answers
from vllm_rvec.vector.settings_file import read_settings

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.processes import RunningServer

pytestmark = pytest.mark.engine

PROBLEMS = 24
ALPHAS = [0.5, 1]
SECONDS = 280


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few of the demo's problems, with the demo's flags for the engine."""
    folder = tmp_path_factory.mktemp("sweep")
    lines = (DEMO / "questions.jsonl").read_text().splitlines()[:PROBLEMS]
    (folder / "chains.jsonl").write_text("\n".join(lines) + "\n")
    serve = read_settings(DEMO / "serve.yaml")
    settings = {
        "model": str(DEMO / "target"),
        "vector": str(DEMO / "vector"),
        "alphas": ALPHAS,
        "tasks": [{"path": "chains.jsonl", "scorer": "numeric", "max_tokens": 80}],
        "engine": serve["engine"],
        "env": serve.get("env", {}),
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "vllm_rvec", "sweep", *map(str, arguments)]


def texts(folder: Path) -> dict[tuple[str, str], str]:
    return {(a.arm, a.problem): a.text for a in read_answers(folder) if a.arm != "random@1"}


def shown(folder: Path) -> dict[str, Any]:
    """What a report says of the arms that a served dial has."""
    report = json.loads((folder / "report.json").read_text())
    ours = [one for one in report["summaries"] if one["arm"] != "random@1"]
    against_base = [
        one for one in report["comparisons"] if "random@1" not in {one["arm"], one["reference"]}
    ]
    return {"summaries": ours, "comparisons": against_base}


@pytest.fixture(scope="module")
def served(config: Path, demo: RunningServer) -> Path:
    """The folder of a sweep of the demo as it is served, which nothing stopped."""
    folder = config.parent / "served"
    done = subprocess.run(
        command("--config", config, "--endpoint", demo.base_url, "--output", folder),
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "without random@1" in done.stderr
    return folder


def test_a_served_dial_is_swept(served: Path) -> None:
    """The vector does what it is for, and greedy answers at one alpha come out the same twice."""
    report = json.loads((served / "report.json").read_text())
    right = {
        one["arm"]: one["correct"] for one in report["summaries"] if one["scope"]["task"] == ""
    }
    assert right["v@1"] > right["base"] > right["-v"]
    found = texts(served)
    base = {problem: text for (arm, problem), text in found.items() if arm == "base"}
    repeat = {problem: text for (arm, problem), text in found.items() if arm == "repeat"}
    assert base == repeat
    assert len(base) == PROBLEMS


def test_a_killed_engine_ends_it_and_another_run_finishes_it(
    served: Path, config: Path, tmp_path: Path
) -> None:
    """With the same answers and numbers as the sweep that nothing stopped, and a random vector."""
    folder = tmp_path / "own"
    given = ("--config", config, "--output", folder)
    log = tmp_path / "log"
    with log.open("w") as stderr:
        first = subprocess.Popen(
            command(*given, "--retries", 0, "--max-concurrency", 2),
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    answers = folder / ANSWERS_NAME
    until(
        lambda: (
            first.poll() is not None
            or (answers.exists() and answers.read_bytes().count(b"\n") > 20)
        ),
        "it asks",
        SECONDS,
    )
    for engine in engine_processes(first.pid):
        engine.kill()
    assert first.wait(60) == 9, log.read_text()[-4000:]
    assert "run the same command again" in log.read_text()
    kept = read_answers(folder)
    assert 20 < len(kept) < 9 * PROBLEMS
    done = subprocess.run(
        command(*given), capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert read_answers(folder)[: len(kept)] == kept
    assert len(read_answers(folder)) == 9 * PROBLEMS
    assert texts(folder) == texts(served)
    assert shown(folder) == shown(served)
    record = json.loads((folder / "sweep.json").read_text())
    assert (record["how"], len(record["runs"])) == ("dial", 2)
