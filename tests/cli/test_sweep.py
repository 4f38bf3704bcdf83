"""vllm_rvec.cli.sweep: the command on an address that serves, as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from aiohttp import web

from tests.support.processes import until
from tests.support.stand_in_api import Asked, StandIn, run_stand_in
from vllm_rvec.evaluation.answers import ANSWERS_NAME, read_answers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROBLEMS = 40
KEY = "a-key-that-nobody-may-see"


def say(asked: Asked) -> str:
    """Be right more often at higher alphas; asked to think, no more than without."""
    number = int(asked.text.split("\n")[0].removeprefix("Say "))
    known = 10 + 20 * float(asked.body["alpha"])
    return str(number if number < known else -1)


@pytest.fixture
def server() -> Iterator[StandIn]:
    with run_stand_in(say) as running:
        yield running


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "says.jsonl"
    lines = [json.dumps({"question": f"Say {n}", "answer": str(n)}) for n in range(PROBLEMS)]
    path.write_text("\n".join(lines) + "\n")
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "vllm_rvec", "sweep", *map(str, arguments)]


def sweep(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "COLUMNS": "120", **env},
    )


def basics(server: StandIn, task: Path, output: Path) -> list[object]:
    return ["--endpoint", server.url, "--task", task, "--alphas", "-1:1.5:0.5", "--output", output]


def base_alone(server: StandIn, task: Path, output: Path) -> list[object]:
    return ["--endpoint", server.url, "--task", task, "--output", output, "--arms", "base"]


def accuracy(report: dict[str, Any]) -> dict[str, int]:
    """The correct answers of each arm, all tasks together."""
    found = [one for one in report["summaries"] if one["scope"]["task"] in {"", "says"}]
    return {one["arm"]: one["correct"] for one in found}


def test_a_served_dial_is_swept(server: StandIn, task: Path, tmp_path: Path) -> None:
    """All arms that it can have; what it can't is said. Report, table and verdict."""
    done = sweep(*basics(server, task, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "without random@1: it holds no random vector" in done.stderr
    arms = {answer.arm for answer in read_answers(tmp_path / "out")}
    assert arms == {
        *("base", "base+prompt", "repeat", "-v", "v@-0.5", "v@0.5", "v@1", "v@1.5"),
        *("v@0.5+prompt", "v@1+prompt", "v@1.5+prompt"),
    }
    assert len(server.asked) == PROBLEMS * len(arms)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    right = accuracy(report)
    assert (right["base"], right["v@1"], right["-v"], right["v@1.5"]) == (10, 30, 0, 40)
    assert "Use alpha 1.5" in " ".join(done.stdout.split())
    assert (tmp_path / "out" / "report.html").is_file()
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert record["how"] == "endpoint"
    assert record["vector_digest"] == "blake3:v"
    assert record["runs"][0]["endpoint"] == server.url
    assert record["runs"][0]["command"].startswith(f"vllm-rvec sweep --endpoint {server.url}")
    assert "random@1" in record["missing"]


def test_machines_get_the_report_as_json(server: StandIn, task: Path, tmp_path: Path) -> None:
    """And nothing else on stdout."""
    done = sweep(*basics(server, task, tmp_path / "out"), "--limit", 5, "--json")
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "report.json").read_text())
    assert len({answer.problem for answer in read_answers(tmp_path / "out")}) == 5


def test_the_key_comes_from_the_environment_and_is_written_nowhere(
    server: StandIn, task: Path, tmp_path: Path
) -> None:
    """Not in the folder, not on the screen."""
    written = {
        "endpoint": server.url,
        "api_key_env": "SWEEP_TEST_KEY",
        "tasks": [str(task)],
        "arms": ["base"],
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(written))
    out = tmp_path / "out"
    given = ("--config", tmp_path / "sweep.yaml", "--output", out)
    refused = sweep(*given)
    assert refused.returncode == 3
    assert "SWEEP_TEST_KEY is not set" in refused.stderr
    done = sweep(*given, SWEEP_TEST_KEY=KEY)
    assert done.returncode == 0, done.stderr
    assert {asked.authorization for asked in server.asked} == {f"Bearer {KEY}"}
    files = [path.read_text() for path in out.rglob("*") if path.is_file()]
    assert not any(KEY in text for text in [*files, done.stdout, done.stderr])


def test_a_sweep_goes_on_where_the_server_died(server: StandIn, task: Path, tmp_path: Path) -> None:
    """Nothing is asked twice, and the report is that of a sweep that nothing stopped."""

    def fail(_: Asked) -> web.Response | None:
        return web.Response(status=503, text="gone") if len(server.asked) >= 100 else None

    server.fail = fail
    given = [*basics(server, task, tmp_path / "out"), "--retries", 0, "--max-concurrency", 4]
    stopped = sweep(*given)
    assert stopped.returncode == 9
    assert "no longer answers" in stopped.stderr
    assert "run the same command again" in stopped.stderr
    kept = len(read_answers(tmp_path / "out"))
    assert 90 <= kept <= 100
    path = tmp_path / "out" / ANSWERS_NAME
    path.write_bytes(path.read_bytes()[:-7])  # as a crash leaves it
    server.fail = lambda _: None
    server.asked.clear()
    assert sweep(*given).returncode == 0
    assert len(server.asked) == PROBLEMS * 11 - (kept - 1)
    whole = sweep(*basics(server, task, tmp_path / "whole"))
    assert whole.returncode == 0
    reports = [json.loads((tmp_path / f / "report.json").read_text()) for f in ("out", "whole")]
    for report in reports:
        del report["facts"]
    assert reports[0] == reports[1]


def test_more_is_asked_where_more_is_wanted(server: StandIn, task: Path, tmp_path: Path) -> None:
    """Alphas and problems are added; another seed is another sweep."""
    given = ("--endpoint", server.url, "--task", task, "--output", tmp_path / "out")
    arms = ("--arms", "base,vector")
    assert sweep(*given, *arms, "--alphas", "0.5", "--limit", 10).returncode == 0
    assert len(server.asked) == 20
    assert sweep(*given, *arms, "--alphas", "0.5,1", "--limit", 20).returncode == 0
    assert len(server.asked) == 60
    refused = sweep(*given, *arms, "--alphas", "0.5,1", "--seed", 1)
    assert refused.returncode == 3
    assert "seed: 0 there, 1 now" in refused.stderr
    task.write_text(task.read_text().replace("Say 3", "Say 4"))
    refused = sweep(*given, *arms)
    assert "task says: another digest" in refused.stderr


def test_a_folder_without_an_answer_holds_no_sweep(
    server: StandIn, task: Path, tmp_path: Path
) -> None:
    """As an engine leaves it that did not start: other flags may be tried at once."""
    out = tmp_path / "out"
    given = base_alone(server, task, out)
    assert sweep(*given).returncode == 0
    (out / "answers.jsonl").write_bytes(b"")
    assert sweep(*given, "--seed", 1).returncode == 0


def test_answers_to_nobody_knows_what_are_not_gone_on_with(
    server: StandIn, task: Path, tmp_path: Path
) -> None:
    """Whoever removed the record would have another sweep's answers in this one's report."""
    out = tmp_path / "out"
    given = base_alone(server, task, out)
    assert sweep(*given).returncode == 0
    (out / "sweep.json").unlink()
    refused = sweep(*given, "--seed", 1)
    assert refused.returncode == 3
    assert "holds answers, and no sweep.json that says to what" in refused.stderr


def test_the_report_is_written_again_without_asking(
    server: StandIn, task: Path, tmp_path: Path
) -> None:
    """Of what the last run asked; and refused where the problems are others by now."""
    out = tmp_path / "out"
    assert sweep(*basics(server, task, out)).returncode == 0
    asked = len(server.asked)
    fewer = ("--arms", "base,vector", "--alphas", "0.5", "--limit", 20)
    assert sweep(*basics(server, task, out), *fewer).returncode == 0
    before = (out / "report.json").read_text()
    (out / "report.json").unlink()
    again = sweep("--report-only", "--output", out, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == json.loads(before)
    assert len(server.asked) == asked
    task.write_text(task.read_text().replace("Say 3", "Say 4"))
    refused = sweep("--report-only", "--output", out)
    assert refused.returncode == 3
    assert "other problems than were asked: says" in refused.stderr
    nothing = sweep("--report-only", "--output", tmp_path)
    assert "there is no sweep" in nothing.stderr


def test_ctrl_c_keeps_what_is_there_and_says_how_to_go_on(
    server: StandIn, task: Path, tmp_path: Path
) -> None:
    """With status 130."""
    server.delay_seconds = 0.05
    given = [*basics(server, task, tmp_path / "out"), "--max-concurrency", 2]
    process = subprocess.Popen(
        command(*given), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until(lambda: len(server.asked) > 10, "it asks")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert "run the same command again to go on" in stderr
    kept = read_answers(tmp_path / "out")
    assert len(kept) >= 8
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_variant_that_changes_meanwhile_ends_it(
    server: StandIn, task: Path, tmp_path: Path
) -> None:
    """Its answers would be of another arm."""
    server.cards = [
        {"id": name, "rvec": {"alpha": alpha, "vector": "v", "fingerprint": "f"}}
        for name, alpha in (("base", 0.0), ("enhanced@1", 1.0))
    ]
    server.say = lambda _: "1"
    server.headers = {"X-Rvec-Alpha": "0"}
    done = sweep(*basics(server, task, tmp_path / "out"))
    assert done.returncode == 3
    assert "at another alpha" in done.stderr
    assert "without v@0.5: no variant has alpha 0.5; there are 0, 1" in done.stderr


def test_a_dry_run_says_what_would_be_asked(server: StandIn, task: Path, tmp_path: Path) -> None:
    """And makes nothing, asks nothing."""
    done = sweep(*basics(server, task, tmp_path / "out"), "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert plan["requests"] == PROBLEMS * 11
    assert [task["problems"] for task in plan["tasks"]] == [PROBLEMS]
    assert plan["completion_tokens"] == PROBLEMS * 11 * 512
    assert list(plan["missing"]) == ["random@1"]
    assert not (tmp_path / "out").exists()
    assert server.asked == []
    shown = sweep(*basics(server, task, tmp_path / "out"), "--dry-run")
    assert "would be asked" in shown.stdout
    assert "440" in shown.stdout


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ({"endpont": "http://x:1"}, "`endpont` is not a setting; did you mean `endpoint`?"),
        ({"alphas": "1:0:1"}, "`alphas`: the range 1:0:1 is empty"),
        ({"arms": ["vector"]}, "`arms` lacks `base`"),
        ({"endpoint": "http://user:secret@x"}, "`endpoint`: should be http://HOST:PORT"),
        ({"endpoint": None}, "`model` is missing, and there is no `endpoint`"),
        ({"tasks": []}, "`tasks`"),
        ({"tasks": [{"path": "a", "scorr": "exact"}]}, "did you mean `scorer`?"),
        ({"tasks": ["a.jsonl", "b/a.jsonl"]}, "two tasks are called a"),
        ({"temperature": True}, "should be a number, not true or false"),
        ({"engine_words": ["b.jsonl"]}, "'b.jsonl' belongs to no flag"),
        ({"engine_words": ["--dtype", "float32"]}, "what stands after -- is for an engine"),
    ],
)
def test_what_is_wrong_is_said_at_once(
    tmp_path: Path, written: dict[str, Any], problem: str
) -> None:
    """With the nearest name that there is, and no value that may be a secret."""
    basic = {"endpoint": "http://127.0.0.1:9", "tasks": ["a.jsonl"]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(basic | written))
    done = sweep("--config", tmp_path / "sweep.yaml")
    assert done.returncode == 3, done.stderr
    assert problem in done.stderr
    assert "secret" not in done.stderr


def test_an_address_where_nobody_answers_is_said(task: Path, tmp_path: Path) -> None:
    """Before anything is written."""
    with run_stand_in(say) as gone:
        pass
    done = sweep(*basics(gone, task, tmp_path / "out"))
    assert done.returncode == 9
    assert f"Can't ask {gone.url} for its models." in done.stderr


def test_code_is_not_run_unless_allowed(server: StandIn, tmp_path: Path) -> None:
    """Said before anything is asked."""
    (tmp_path / "code.jsonl").write_text('{"question": "f", "answer": "assert f() == 1"}\n')
    task = {"path": "code.jsonl", "scorer": "python"}
    (tmp_path / "sweep.yaml").write_text(
        yaml.safe_dump({"endpoint": server.url, "tasks": [task], "arms": ["base"]})
    )
    given = ("--config", tmp_path / "sweep.yaml", "--output", tmp_path / "out")
    refused = sweep(*given)
    assert refused.returncode == 3
    assert "runs code that the model writes" in refused.stderr
    server.say = lambda _: "def f():\n    return 1"
    done = sweep(*given, "--allow-code")
    assert done.returncode == 0, done.stderr
    assert read_answers(tmp_path / "out")[0].is_correct


def test_a_second_sweep_in_the_folder_is_refused(
    server: StandIn, task: Path, tmp_path: Path
) -> None:
    """While the first one runs."""
    server.delay_seconds = 0.2
    given = [*basics(server, task, tmp_path / "out"), "--max-concurrency", 1]
    first = subprocess.Popen(command(*given), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        until(lambda: len(server.asked) > 0, "it asks")
        second = sweep(*given)
        assert second.returncode == 3
        assert "another sweep is writing" in second.stderr
    finally:
        first.kill()
        first.communicate()
