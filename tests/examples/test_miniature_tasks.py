"""The demo's problems: the split holds, the answers are right, the grader is exact."""

from __future__ import annotations

import json
import random
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.miniature import MINIATURE, miniature_module

if TYPE_CHECKING:
    from collections.abc import Callable

DRAWS = 300

SOLUTIONS: dict[str, Callable[[list[str]], str]] = {
    "count": lambda found: str(found[1:].count(found[0])),
    "max": max,
    "copy": " ".join,
    "reverse": lambda found: " ".join(found[::-1]),
    "sort": lambda found: " ".join(sorted(found)),
    "compare": lambda found: "yes" if found[0] > found[1] else "no",
}
"""Each family but chain, solved from the numbers or letters of its question, taken as text."""


tasks = miniature_module("tasks")
FAMILIES: tuple[str, ...] = (*tasks.REASONING_FAMILIES, *tasks.OTHER_FAMILIES)


def _rng(seed: str) -> random.Random:
    return random.Random(seed)  # noqa: S311 - problems, not secrets


def _draw(family: str, wording: str, split: str) -> list[Any]:
    rng = _rng(f"{family} {wording} {split}")
    return [tasks.draw_problem(rng, family, wording, split) for _ in range(DRAWS)]


def _content(question: str) -> list[str]:
    """The numbers and single letters that a list question is about, in their order."""
    return re.findall(r"\b(?:\d+|[a-j])\b", question)


@pytest.mark.parametrize("wording", ["S", "T"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_held_out_problem_is_drawn_for_training(family: str, wording: str) -> None:
    """Training draws lie on the train side, in both wordings; held-out draws on the other."""
    training = {problem.key for problem in _draw(family, wording, "train")}
    held_out = {problem.key for problem in _draw(family, "T", "held_out")}
    assert {tasks.split_of(key) for key in training} == {"train"}
    assert {tasks.split_of(key) for key in held_out} == {"held_out"}
    assert not training & held_out


def test_supervised_and_rl_data_draw_from_the_train_side_only() -> None:
    """Every module that trains asks `draw_problem` for "train" and names no other split."""
    for name in ("supervised.py", "grpo.py"):
        source = (MINIATURE / name).read_text(encoding="utf-8")
        assert source.count("draw_problem(") == 1
        assert '"train"' in source
        assert "held_out" not in source


def test_a_problem_has_one_key_whatever_its_wording_name_and_item() -> None:
    """The key of a chain is its arithmetic, so that no wording leaks a held-out problem."""
    for wording in ("S", "T"):
        for problem in _draw("chain", wording, "train"):
            start, *_ = re.findall(r"\d+", problem.question)
            steps = re.findall(r"(Add|Gets|Take|Gives) (\d)", problem.question)
            signed = "".join(("+" if v in ("Add", "Gets") else "-") + n for v, n in steps)
            assert problem.key == f"chain {start}{signed}"


def test_one_problem_in_ten_is_held_out() -> None:
    """The hash splits evenly enough: 10 % of 10,000 keys, within 5 standard deviations."""
    held_out = sum(tasks.split_of(f"chain {index}") == "held_out" for index in range(10_000))
    assert held_out == pytest.approx(1000, abs=150)


@pytest.mark.parametrize("wording", ["S", "T"])
def test_chain_answers_and_every_worked_step_are_right(wording: str) -> None:
    """The answer follows from the question's text, and each step from the one before."""
    for problem in _draw("chain", wording, "train"):
        assert problem.answer == str(tasks.chain_value(problem.question))
        start, *steps = problem.work.rstrip(".").split(" ")
        total = int(start)
        for step in steps:
            change, shown = step.split("=")
            total += int(change)
            assert total == int(shown)
            assert 0 <= total <= 99
        assert str(total) == problem.answer


@pytest.mark.parametrize("wording", ["S", "T"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "chain"])
def test_answers_of_the_other_families_are_right(family: str, wording: str) -> None:
    """Each answer follows from the question's text, computed here in another way."""
    for problem in _draw(family, wording, "held_out"):
        found = _content(problem.question)
        assert problem.answer == SOLUTIONS[family](found), problem.question


@pytest.mark.parametrize("family", FAMILIES)
def test_the_grader_accepts_both_styles_of_a_right_reply(family: str) -> None:
    """A reply graded right may show its steps or not."""
    for problem in _draw(family, "T", "held_out"):
        for is_worked in (True, False):
            text = tasks.response(problem, is_worked=is_worked)
            assert tasks.is_correct(text, problem.answer)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "43",
        "Answer: 44",
        "Answer: 430",
        "Answer: 4",
        "Answer: -43",
        "Answer:43",
        "Answer: 43.",
        "Answer: 43 apples",
        "Answer: 43 Answer: 44",
        "No Answer: 44 +1=43",
        "xAnswer: 43",
        "46 +5=51 -8=43.",
        "46 +5=51 -8=43. Answer: 51",
    ],
)
def test_the_grader_refuses_anything_but_the_exact_final_answer(text: str) -> None:
    """Neither a right number elsewhere, nor more or less than the number, earns the reward."""
    assert not tasks.is_correct(text, "43")


def test_harder_problems_show_their_steps_less_often() -> None:
    """The style rule of SFT and target falls with difficulty, from over 0.8 to under 0.1."""
    problems = sorted(_draw("chain", "T", "train"), key=lambda problem: problem.difficulty)
    shares = [tasks.worked_probability(problem) for problem in problems]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.8
    assert shares[-1] < 0.1


def test_draws_repeat_with_the_seed_and_are_distinct() -> None:
    """The same seed gives the same problems, no two with one key."""
    first, second = (
        tasks.draw_distinct(_rng("repeat"), ["chain"], "T", "held_out", 200) for _ in range(2)
    )
    assert first == second
    assert len({problem.key for problem in first}) == 200


def test_committed_questions_are_held_out_and_rightly_answered() -> None:
    """questions.jsonl holds distinct chain problems in the target's wording, all held out."""
    lines = (MINIATURE / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == len({row["question"] for row in rows}) == 200
    for row in rows:
        assert row.keys() == {"question", "answer"}
        assert row["answer"] == str(tasks.chain_value(row["question"]))
        start, *_ = re.findall(r"\d+", row["question"])
        steps = re.findall(r"(Gets|Gives) (\d)", row["question"])
        signed = "".join(("+" if verb == "Gets" else "-") + number for verb, number in steps)
        assert tasks.split_of(f"chain {start}{signed}") == "held_out"
