"""lm-evaluation-harness through our router, beside our own scorer, problem by problem."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.integration.conftest import DEMO, ROOT
from vllm_rvec.evaluation.answers import read_answers

if TYPE_CHECKING:
    from tests.support.processes import RunningServer
    from vllm_rvec.evaluation.records import Answer

pytestmark = pytest.mark.engine

ENVIRONMENT = Path(os.environ.get("LM_EVAL_ENV", ROOT / ".venv-lm-eval"))
TASK = ROOT / "examples" / "lm_eval" / "local_gsm8k.yaml"
PROBLEMS = 40


@pytest.fixture(scope="module")
def harness() -> Path:
    """The command, in an environment of its own."""
    command = ENVIRONMENT / "bin" / "lm_eval"
    if not command.exists():
        pytest.skip(f"lm-evaluation-harness is not in {ENVIRONMENT}: make lm-eval")
    return command.absolute()


def write_problems(folder: Path) -> None:
    """Put the demo's problems in GSM8K's form."""
    lines = (DEMO / "questions.jsonl").read_text().splitlines()[:PROBLEMS]
    problems = [json.loads(line) for line in lines]
    given = [{"question": one["question"], "answer": f"#### {one['answer']}"} for one in problems]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, given)) + "\n")


def asked_by_harness(harness: Path, server: RunningServer, folder: Path) -> list[dict[str, Any]]:
    """What the documented command finds, in the problems' order."""
    where = f"base_url={server.base_url}/chat/completions"
    done = subprocess.run(
        [
            *(str(harness), "run", "--model", "local-chat-completions"),
            *("--model_args", f"model=enhanced@1,{where},num_concurrent=16"),
            *("--include_path", str(TASK.parent), "--tasks", TASK.stem, "--apply_chat_template"),
            *("--output_path", "results", "--log_samples"),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (samples,) = (folder / "results").rglob("samples_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    return sorted(found, key=lambda one: int(one["doc_id"]))


def asked_by_us(server: RunningServer, folder: Path) -> list[Answer]:
    """What `vllm-rvec sweep` finds, in the problems' order: the last number, as the harness."""
    task = {
        "path": "problems.jsonl",
        "format": "gsm8k",
        "instruction": "",
        "max_tokens": 80,
        "options": {"places": ["last"]},
    }
    settings = {
        "endpoint": server.base_url,
        "alphas": [1],
        "arms": ["base", "vector"],
        "tasks": [task],
        "output": "out",
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(settings))
    done = subprocess.run(
        [sys.executable, "-m", "vllm_rvec", "sweep", "--config", str(folder / "sweep.yaml")],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [answer for answer in read_answers(folder / "out") if answer.arm == "v@1"]
    return sorted(found, key=lambda answer: int(answer.problem))


def test_the_harness_agrees_with_our_scorer_on_every_problem(
    harness: Path, demo: RunningServer, tmp_path: Path
) -> None:
    """The same answers, greedy, and the same grades: right and wrong ones."""
    write_problems(tmp_path)
    theirs, ours = asked_by_harness(harness, demo, tmp_path), asked_by_us(demo, tmp_path)
    assert len(theirs) == len(ours) == PROBLEMS
    assert [one["resps"][0][0] for one in theirs] == [answer.text for answer in ours]
    assert [one["exact_match"] == 1 for one in theirs] == [answer.is_correct for answer in ours]
    assert {answer.is_correct for answer in ours} == {True, False}
