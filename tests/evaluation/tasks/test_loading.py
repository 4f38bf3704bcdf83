"""Tasks as a whole: all faults at once, choice by a limit, digests, permission to run code."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from tests.evaluation.tasks.conftest import BBH, HUMANEVAL
from vllm_rvec.errors import ConfigError
from vllm_rvec.evaluation.tasks import TaskSpec, check_task, load_task
from vllm_rvec.evaluation.tasks.files import MAX_LINE_BYTES
from vllm_rvec.evaluation.tasks.spec import FewShot

if TYPE_CHECKING:
    from pathlib import Path

    from tests.evaluation.tasks.conftest import Write
    from vllm_rvec.evaluation.records import Task


def load(path: Path, **spec: Any) -> Task:
    return load_task(TaskSpec.model_validate({"path": str(path), **spec}))


def lines(count: int) -> list[dict[str, object]]:
    return [{"question": f"{n}+{n}?", "answer": str(2 * n)} for n in range(count)]


def refusal(path: Path, **spec: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(path, **spec)
    return caught.value


def test_all_faults_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    """With their lines; good lines between them don't hide any."""
    good = b'{"question": "q", "answer": "a"}\n'
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        b'{"question": "q", "answer": \n'
        + good
        + b"\n"  # a blank line is none
        + b'{"question": "\xff", "answer": "a"}\n'
        + b'["question"]\n'
        + b'{"question": "q", "answer": "a", "answer": "b"}\n'
        + b'{"question": "q", "answer": NaN}\n'
        + b'{"question": "q"}\n'
        + b'{"question": "'
        + b"x" * MAX_LINE_BYTES
        + b'", "answer": "a"}\n'
        + b'{"question": "q", "answer": "a", "id": "2"}\n'
        + b'{"question": "q", "answer": '
        + b"[" * 100_000
        + b"\n"
        + b'{"question": "q", "answer": [1e999]}\n'
    )
    problems = refusal(path).problems
    assert [problem.partition(":")[0] for problem in problems] == [
        f"line {n}" for n in (1, 4, 5, 6, 7, 8, 9, 10, 11, 12)
    ]
    said = "\n".join(problems)
    for words in (
        "not JSON: Expecting value",
        "not UTF-8, from byte 15 on",
        "an object is expected, not a list",
        "`answer` is given twice",
        "NaN is no number",
        "`answer` is missing",
        "longer than 1,048,576 bytes",
        "the id 2 is that of line 2 already",
        "nested too deep",
        "a number is too large",
    ):
        assert words.replace("an object", "a JSON object") in said


def test_a_long_list_of_faults_is_cut(tmp_path: Path) -> None:
    """The message shows the first few and counts the rest; `problems` has them all."""
    path = tmp_path / "bad.jsonl"
    path.write_text("x\n" * 100)
    error = refusal(path)
    assert len(error.problems) == 100
    assert "line 8" in str(error)
    assert "... and 92 more" in str(error)
    assert error.path == path


def test_faults_name_the_file_where_there_are_several(write: Write) -> None:
    """In a folder of subtasks."""
    folder = write("bbh/a.json", [BBH[0], {"input": 5}]).parent
    write("bbh/b.jsonl", [{"target": "x"}])
    problems = refusal(folder, format="bbh").problems
    assert problems[0].startswith("a.json, example 2: ")
    assert problems[1].startswith("b.jsonl, line 1: `input` is missing")


def test_empty_files_are_refused(tmp_path: Path) -> None:
    """A task that asks nothing says so, also where all it has are examples."""
    path = tmp_path / "empty.jsonl"
    path.write_text("\n\n")
    assert "its file is empty" in str(refusal(path))
    path.write_text('{"question": "q", "answer": "a"}\n')
    shots = {"path": str(path), "count": 1}
    assert "all its problems are examples" in str(refusal(path, few_shot=shots))


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    """A path that isn't there, a folder without tasks, and a file that can't be read."""
    assert "there is no task's file" in str(refusal(tmp_path / "none.jsonl"))
    (tmp_path / "folder").mkdir()
    assert "holds no task's file" in str(refusal(tmp_path / "folder"))
    (tmp_path / "cut.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00\x00")
    assert "can't be read" in str(refusal(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert "a list is expected" in str(refusal(tmp_path / "x.json"))


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    """Some editors write one."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "q", "answer": "a"}')
    assert len(load(path).problems) == 1


def test_a_limit_chooses_by_a_hash(write: Write) -> None:
    """A larger limit only adds problems; another seed chooses others; the order is the file's."""
    path = write("own.jsonl", lines(50))
    few, more, all_ = (load(path, limit=limit) for limit in (5, 20, 500))
    assert len(few.problems) == 5
    assert {p.id for p in few.problems} < {p.id for p in more.problems}
    assert len(all_.problems) == 50
    assert [int(p.id) for p in more.problems] == sorted(int(p.id) for p in more.problems)
    assert load(path, limit=5, seed=1).problems != few.problems


def test_the_digest_tells_tasks_apart_that_ask_something_else(write: Write) -> None:
    """Question, answer, scorer, options, length and prompt count; file and name do not."""
    path, copy = write("own.jsonl", lines(3)), write("copy.jsonl", lines(3))
    digest = load(path).digest
    assert len(digest) == 64
    assert load(copy, name="other").digest == digest
    changed = [
        load(write("more.jsonl", lines(4))),
        load(write("else.jsonl", [*lines(2), {"question": "4", "answer": "5"}])),
        load(path, scorer="numeric"),
        load(path, options={"ignore_case": True}),
        load(path, max_tokens=5),
        load(path, stop=("x",)),
        load(path, thinking_prompt="Think."),
        load(path, system="Be short."),
    ]
    assert len({digest, *(task.digest for task in changed)}) == len(changed) + 1


def test_code_is_run_only_where_it_is_allowed(write: Write) -> None:
    """By the spec or by the caller, never by the scorer's options."""
    path = write("code.jsonl", HUMANEVAL)
    assert "allow_code: true" in str(refusal(path, format="humaneval"))
    smuggled = {"allow_code": True}
    assert "beside `scorer`" in str(refusal(path, format="humaneval", options=smuggled))
    spec = TaskSpec(path=str(path), format="humaneval")
    assert load_task(spec, allow_code=True).scorer_options["allow_code"] is True
    assert load(path, format="humaneval", allow_code=True).scorer == "python"
    others = load_task(TaskSpec(path=str(write("own.jsonl", lines(1)))), allow_code=True)
    assert others.scorer_options == {}


def test_what_a_dataset_would_do_is_checked_before_it_is_fetched() -> None:
    """Permission, scorer and options: nothing is asked of the Hub."""
    code = TaskSpec(dataset="owner/never-fetched", format="humaneval")
    with pytest.raises(ConfigError, match="runs code that the model writes"):
        check_task(code)
    check_task(code, allow_code=True)
    check_task(code.model_copy(update={"allow_code": True}))
    wrong = TaskSpec(dataset="owner/never-fetched", scorer="exact", options={"befor": "A"})
    with pytest.raises(ConfigError, match="`befor` is not a setting"):
        check_task(wrong)


def test_wrong_options_of_a_scorer_are_told(write: Write) -> None:
    """Before a file is read."""
    path = write("own.jsonl", lines(1))
    assert "no scorer exat" in str(refusal(path, scorer="exat"))
    error = refusal(path, scorer="numeric", options={"tolerance": -1})
    assert "`tolerance`" in str(error)


def test_examples_that_are_wrong_are_told(write: Write, tmp_path: Path) -> None:
    """None there, too few, not of the format."""
    path = write("own.jsonl", lines(3))
    few = refusal(path, few_shot={"path": str(path), "count": 4})
    assert "4 examples are to be shown" in str(few)
    assert "no file of examples" in str(refusal(path, few_shot={"path": str(tmp_path / "x")}))
    bad = write("bad.jsonl", [{"question": "q"}])
    assert "line 1: `answer` is missing" in str(refusal(path, few_shot={"path": str(bad)}))
    (tmp_path / "shots").mkdir()
    assert "no `.txt`" in str(refusal(path, few_shot={"path": str(tmp_path / "shots")}))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({}, "either a `path` or a `dataset`"),
        ({"path": "a", "dataset": "a/b"}, "either a `path` or a `dataset`"),
        ({"dataset": "a b"}, "owner/name"),
        ({"path": "a", "limit": 0}, "greater than or equal to 1"),
        ({"path": "a", "limit": True}, "limit"),
        ({"path": "a", "format": "mmlu"}, "humaneval"),
        ({"path": "a", "scorrer": "exact"}, "Extra inputs"),
    ],
)
def test_specs_are_checked(spec: dict[str, Any], said: str) -> None:
    """Once, at the edge."""
    with pytest.raises(ValidationError, match=said):
        TaskSpec.model_validate(spec)


@pytest.mark.parametrize("model", [TaskSpec, FewShot])
def test_every_field_is_documented(model: type[TaskSpec] | type[FewShot]) -> None:
    """A docstring under each field becomes its description."""
    assert all(field.description for field in model.model_fields.values())


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ({"path": "x/own.jsonl"}, "own"),
        ({"path": "x/HumanEval.jsonl.gz"}, "HumanEval"),
        ({"path": "x/bbh"}, "bbh"),
        ({"dataset": "openai/gsm8k@abc", "subset": "main"}, "gsm8k-main"),
        ({"path": "a", "name": "mine"}, "mine"),
    ],
)
def test_a_task_is_called_after_its_file(spec: dict[str, Any], name: str) -> None:
    """Unless it is given a name."""
    assert TaskSpec.model_validate(spec).called == name


def test_a_task_is_the_same_in_every_load(write: Write) -> None:
    """Nothing in it depends on the process or the time."""
    path = write("own.jsonl", lines(30))
    first, second = load(path, limit=10), load(path, limit=10)
    assert first == second
    assert json.dumps(first.problems[0].answer)
