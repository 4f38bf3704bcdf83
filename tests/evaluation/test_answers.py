"""vllm_rvec.evaluation.answers: what is kept survives a crash, and nothing else passes for it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from vllm_rvec.errors import ConfigError
from vllm_rvec.evaluation.answers import ANSWERS_NAME, AnswerFile, locked_folder, read_answers
from vllm_rvec.evaluation.records import Answer, Grade

if TYPE_CHECKING:
    from pathlib import Path

ANSWER = Answer(
    arm="base",
    task="sums",
    problem="1",
    family="",
    half="choose",
    text="line\nbreak \u2028 \x85 and \r",
    finish_reason="stop",
    prompt_tokens=3,
    completion_tokens=4,
    seconds=0.25,
    grade=Grade(is_correct=True, found="5"),
)


def keep(folder: Path, *answers: Answer) -> None:
    with AnswerFile.open(folder) as file:
        for answer in answers:
            file.keep(answer)


def test_answers_come_back_as_they_were(tmp_path: Path) -> None:
    """Whatever a model wrote; over several runs, in order."""
    other = replace(ANSWER, problem="2", grade=Grade(is_correct=False, found=None, note="late"))
    keep(tmp_path, ANSWER)
    keep(tmp_path, other)
    assert read_answers(tmp_path) == [ANSWER, other]


def test_nothing_is_there_at_first(tmp_path: Path) -> None:
    """No file, no answers."""
    assert read_answers(tmp_path) == []


@pytest.mark.parametrize("lost_bytes", [1, 2, 30])
def test_a_last_line_that_was_cut_off_is_dropped(tmp_path: Path, lost_bytes: int) -> None:
    """And overwritten by what comes next, also where only the line's end is missing."""
    other = replace(ANSWER, problem="2")
    keep(tmp_path, ANSWER, other)
    path = tmp_path / ANSWERS_NAME
    path.write_bytes(path.read_bytes()[:-lost_bytes])
    assert read_answers(tmp_path) == [ANSWER]
    third = replace(ANSWER, problem="3")
    keep(tmp_path, third)
    assert read_answers(tmp_path) == [ANSWER, third]


def test_a_damaged_line_elsewhere_is_an_error(tmp_path: Path) -> None:
    """With its number."""
    keep(tmp_path, ANSWER, replace(ANSWER, problem="2"))
    path = tmp_path / ANSWERS_NAME
    first, second, _ = path.read_bytes().split(b"\n")
    path.write_bytes(first[:-9] + b"\n" + second + b"\n")
    with pytest.raises(ConfigError, match=f"line 1 of .*{ANSWERS_NAME} is no answer"):
        read_answers(tmp_path)


def test_the_first_of_two_answers_counts(tmp_path: Path) -> None:
    """Two runs may have asked the same, where a crash came between answer and line."""
    keep(tmp_path, ANSWER, replace(ANSWER, text="again"))
    assert read_answers(tmp_path) == [ANSWER]


def test_a_folder_has_one_sweep_at_a_time(tmp_path: Path) -> None:
    """The second is told so at once, and may have it afterwards."""
    folder = tmp_path / "new" / "folder"
    with (
        locked_folder(folder),
        pytest.raises(ConfigError, match="another sweep is writing"),
        locked_folder(folder),
    ):
        pass
    with locked_folder(folder):
        pass


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """In words."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="can't be used"), locked_folder(tmp_path / "file"):
        pass
