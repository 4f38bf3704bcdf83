"""examples/paper: the paper's protocol, with all but the weights and the Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tests.support.stand_in_api import Asked, run_stand_in
from vllm_rvec.evaluation.answers import read_answers
from vllm_rvec.evaluation.config import load_sweep_config
from vllm_rvec.evaluation.records import ArmKind
from vllm_rvec.vector.settings_file import read_settings

if TYPE_CHECKING:
    from tests.support.checkpoints import Family

FILE = Path(__file__).resolve().parents[2] / "examples" / "paper" / "sweep-qwen2.5-1.5b.yaml"
ARMS = 17

SAMPLES: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [
        {
            "question": "Leo has 60 apples. Gets 2. How many?",
            "answer": "60+2=<<60+2=62>>62\n#### 62",
        }
    ],
    "humaneval": [
        {
            "task_id": "HumanEval/0",
            "prompt": 'def twice(n):\n    """Return 2 n."""\n',
            "entry_point": "twice",
            "canonical_solution": "    return 2 * n\n",
            "test": "def check(candidate):\n    assert candidate(3) == 6\n",
        }
    ],
    "sciq": [
        {
            "question": "What falls down?",
            "correct_answer": "apples",
            "distractor1": "smoke",
            "distractor2": "light",
            "distractor3": "time",
            "support": "Apples fall down.",
        }
    ],
    "bbh": [{"input": "not True is", "target": "False"}],
}
"""One problem in each benchmark's own form."""


def sweep(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_rvec", "sweep", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "COLUMNS": "120"},
    )


def local(folder: Path) -> Path:
    """The file with its datasets as local files, one problem each."""
    settings = read_settings(FILE)
    tasks: Any = settings["tasks"]
    for task in tasks:
        for name in ("dataset", "subset", "limit"):
            task.pop(name, None)
        task["path"] = f"{task['name']}.jsonl"
        lines = [json.dumps(one) for one in SAMPLES[task["format"]]]
        (folder / task["path"]).write_text("\n".join(lines) + "\n")
    path = folder / FILE.name
    path.write_text(yaml.safe_dump(settings))
    return path


def reply(asked: Asked) -> str:
    """Be right at alpha 1, and only there."""
    if asked.body["alpha"] != 1:
        return "no idea"
    if "apples. Gets" in asked.text:
        return "60 + 2 = 62\n#### 62"
    if "twice" in asked.text:
        return "```python\ndef twice(n):\n    return 2 * n\n```"
    if "falls down" in asked.text:
        letters = {line[4:]: line[1] for line in asked.text.splitlines() if line.startswith("(")}
        return f"Answer: ({letters['apples']})"
    return "The answer is False."


def test_the_file_has_the_papers_arms_and_tasks() -> None:
    """And the controls that it lacks."""
    config = load_sweep_config(FILE, {})
    assert config.arms == tuple(ArmKind)
    assert [task.format for task in config.tasks] == ["gsm8k", "humaneval", "sciq", "bbh"]
    assert {task.thinking_prompt for task in config.tasks} == {"Think step by step."}
    assert 1 in config.alphas
    assert not config.allow_code


def test_a_dry_run_needs_no_network() -> None:
    """What would be fetched is said; code is run only where that is allowed."""
    refused = sweep("--config", FILE, "--dry-run")
    assert refused.returncode == 3
    assert "humaneval runs code" in refused.stderr
    done = sweep("--config", FILE, "--allow-code", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert len(plan["arms"]) == ARMS
    assert plan["missing"] == {}
    assert list(plan["tasks_elsewhere"]) == ["gsm8k", "humaneval", "sciq", "bbh"]
    assert "the model would be fetched: Qwen/Qwen2.5-Math-1.5B" in done.stderr
    assert "`vllm-rvec extract` makes one" in done.stderr


def test_a_stand_in_of_the_architecture_would_be_served_by_a_dial(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """Every problem in every arm."""
    given = ("--config", local(tmp_path), "--model", family.target, "--vector", vector)
    done = sweep(*given, "--allow-code", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["how"] == "dial"
    assert plan["requests"] == ARMS * len(SAMPLES)
    assert {task["scorer"] for task in plan["tasks"]} == {"numeric", "python", "choice", "bbh"}


def test_all_four_benchmarks_are_asked_and_graded(tmp_path: Path) -> None:
    """By a stand-in that is right at alpha 1."""
    with run_stand_in(reply) as server:
        done = sweep("--config", local(tmp_path), "--endpoint", server.url, "--allow-code")
    assert done.returncode == 0, done.stderr
    answers = read_answers(tmp_path / "results-qwen2.5-1.5b")
    assert len(answers) == (ARMS - 1) * len(SAMPLES)
    right = {(answer.arm, answer.task) for answer in answers if answer.is_correct}
    assert right == {(arm, task) for arm in ("v@1", "v@1+prompt") for task in SAMPLES}
    thought = [asked for asked in server.asked if asked.text.endswith("Think step by step.")]
    assert len(thought) == 7 * len(SAMPLES)
