"""Public formats and our own lines: what is asked, what is right, and how it's graded."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.evaluation.tasks.conftest import BBH, GSM8K, HUMANEVAL, SCIQ
from vllm_rvec.evaluation.records import Message
from vllm_rvec.evaluation.scoring import grade
from vllm_rvec.evaluation.tasks import TaskSpec, load_task

if TYPE_CHECKING:
    from tests.evaluation.tasks.conftest import Write
    from vllm_rvec.evaluation.records import Task

MINIATURE = Path(__file__).parents[3] / "examples" / "reasoning_in_miniature" / "questions.jsonl"


def load(path: Path, **spec: Any) -> Task:
    return load_task(TaskSpec.model_validate({"path": str(path), **spec}))


def is_right(task: Task, number: int, text: str) -> bool:
    return grade(task, task.problems[number], text).is_correct


def asked(task: Task, number: int = 0) -> str:
    problem = task.problems[number]
    return problem.messages[-1].content if problem.prompt is None else problem.prompt


def test_our_lines_are_asked_as_they_say(write: Write) -> None:
    """Questions and messages in a chat, a prompt as it is; ids are line numbers where not given."""
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2+2?"}]
    task = load(
        write(
            "own.jsonl",
            [
                {"question": "1+1?", "answer": "2"},
                {"prompt": "1+2=", "answer": 3, "id": "sum"},
                {"messages": chat, "answer": ["4", "four"], "family": "easy", "facts": {"a": 1}},
                {"question": "Pick.", "answer": "B", "choices": ["x", "y"], "id": 7},
            ],
        )
    )
    one, two, three, four = task.problems
    assert (one.id, one.messages, one.prompt) == ("1", (Message("user", "1+1?"),), None)
    assert (two.id, two.messages, two.prompt) == ("sum", (), "1+2=")
    assert three.messages == (Message("system", "Be short."), Message("user", "2+2?"))
    assert (three.id, three.family, three.facts) == ("3", "easy", {"a": 1})
    assert (four.id, four.facts) == ("7", {"choices": ["x", "y"]})
    assert (task.name, task.scorer, task.max_tokens, task.stop) == ("own", "exact", 512, ())
    assert is_right(task, 2, "four")


def test_the_miniatures_questions_are_a_task() -> None:
    """The file in examples/ is in our format."""
    task = load(MINIATURE, scorer="numeric")
    assert len(task.problems) == 200
    assert is_right(task, 0, f"46 +5=51. Answer: {task.problems[0].answer}")


def test_gsm8k_is_asked_and_graded(write: Write) -> None:
    """The number behind `####` is right, in any notation; the solution isn't asked."""
    task = load(write("gsm.jsonl", GSM8K), format="gsm8k")
    assert asked(task).startswith("Uma bakes")
    assert "####" in asked(task)
    assert [problem.answer for problem in task.problems] == ["22", "2,300", "1.5"]
    assert is_right(task, 1, "It's $2300.")
    assert is_right(task, 2, "#### 1 1/2")
    assert (task.scorer, task.stop) == ("numeric", ())


def test_gsm8k_is_completed_as_the_usual_harness_has_it(write: Write) -> None:
    """lm-evaluation-harness's prompt and ends, with its examples' solutions made plain."""
    path = write("gsm.jsonl", GSM8K)
    shots = {"path": str(write("train.jsonl", GSM8K[:1])), "count": 1}
    task = load(path, format="gsm8k", ask="completion", few_shot=shots)
    assert [problem.id for problem in task.problems] == ["2", "3"]
    assert asked(task) == (
        f"Question: {GSM8K[0]['question']}\nAnswer: She bakes 4 * 6 = 24.\n24 - 2 = 22 are left.\n"
        f"#### 22\n\nQuestion: {GSM8K[1]['question']}\nAnswer:"
    )
    assert "Question:" in task.stop


def test_examples_are_earlier_turns_of_a_chat(write: Write) -> None:
    """Each with the same instruction as the question itself."""
    path = write("gsm.jsonl", GSM8K)
    shots = {"path": str(write("train.jsonl", GSM8K[:1])), "count": 1}
    task = load(path, format="gsm8k", few_shot=shots, system="Be short.", instruction="Go.")
    roles = [message.role for message in task.problems[0].messages]
    assert roles == ["system", "user", "assistant", "user"]
    assert task.problems[0].messages[1].content == f"{GSM8K[0]['question']}\n\nGo."


@pytest.mark.parametrize("ask", ["chat", "completion"])
def test_only_the_examples_themselves_are_left_out(write: Write, ask: str) -> None:
    """Every prompt shows them, and many problems have the answer of one: those are asked."""
    sums = [{"id": n, "question": f"{n} + {n % 3}?", "answer": n % 2} for n in range(8)]
    shots = {"path": str(write("train.jsonl", sums[:2])), "count": 2}
    task = load(write("sums.jsonl", sums), ask=ask, few_shot=shots)
    assert [problem.id for problem in task.problems] == [str(n) for n in range(2, 8)]


def test_an_example_that_is_a_chat_shows_what_it_asks(write: Write) -> None:
    """The user's last message, and no empty one."""
    chats = [
        {"messages": [{"role": "user", "content": text}], "answer": text.upper()}
        for text in ("one", "two")
    ]
    path = write("chats.jsonl", chats)
    task = load(path, few_shot={"path": str(path), "count": 1})
    said = [message.content for problem in task.problems for message in problem.messages]
    assert said == ["one", "ONE", "two"]


def test_humaneval_is_asked_and_graded(write: Write) -> None:
    """Asked in a chat or completed; right is what passes the tests."""
    path = write("HumanEval.jsonl.gz", HUMANEVAL)
    task = load(path, format="humaneval", allow_code=True)
    assert (task.name, task.problems[0].id) == ("HumanEval", "HumanEval/0")
    assert "```python\ndef triple" in asked(task)
    assert is_right(task, 0, "```python\ndef triple(n):\n    return n + n + n\n```")
    assert not is_right(task, 0, "    return n\n")
    completed = load(path, format="humaneval", ask="completion", allow_code=True)
    assert asked(completed) == HUMANEVAL[0]["prompt"]
    assert "\ndef" in completed.stop
    assert is_right(completed, 0, HUMANEVAL[0]["canonical_solution"])


def test_sciq_deals_its_options(write: Write) -> None:
    """The right one stands at each letter now and then, and at the same in every load."""
    path = write("sciq.jsonl", SCIQ)
    task = load(path, format="sciq")
    letters = Counter(str(problem.answer) for problem in task.problems)
    assert set(letters) == set("ABCD")
    assert max(letters.values()) < 25
    assert load(path, format="sciq").problems == task.problems
    assert load(path, format="sciq", seed=1).problems != task.problems
    assert is_right(task, 3, "Planets are counted.\nAnswer: planet 3")
    assert is_right(task, 3, f"({task.problems[3].answer})")
    assert asked(task).startswith("Planets are counted from the sun.\n\nWhich planet")
    bare = load(path, format="sciq", support=False)
    assert asked(bare).startswith("Which planet is number 0 from the sun?\n(A) ")


def test_big_bench_hard_is_a_folder_of_subtasks(write: Write) -> None:
    """Each file is a family; ids name it; prompts by family are put before the question."""
    folder = write("bbh/color.json", BBH[:1]).parent
    write("bbh/boolean_expressions.json", BBH[1:])
    prompts = folder.parent / "cot-prompts"
    prompts.mkdir()
    (prompts / "color.txt").write_text("Don't train on this.\n-----\nQ: x\nA: y\n")
    task = load(folder, format="bbh", ask="completion", few_shot={"path": str(prompts)})
    assert [problem.id for problem in task.problems] == ["boolean_expressions/1", "color/1"]
    assert [problem.family for problem in task.problems] == ["boolean_expressions", "color"]
    assert asked(task, 0) == "Q: not ( False ) is\nA:"
    assert asked(task, 1) == f"Q: x\nA: y\n\nQ: {BBH[0]['input']}\nA:"
    assert is_right(task, 1, "Blood is. So the answer is (B).")
    assert is_right(task, 0, "The answer is True.")
    chat = load(folder, format="bbh")
    assert asked(chat, 0).startswith("not ( False ) is\n\n")


def test_a_scorer_of_ones_own_takes_the_formats_instruction_away(write: Write) -> None:
    """It would say where the answer goes for another scorer; options go with the new one."""
    path = write("gsm.jsonl", GSM8K)
    options = {"pattern": r"(\d+)", "compare": "number"}
    task = load(path, format="gsm8k", scorer="regex", options=options)
    assert asked(task) == GSM8K[0]["question"]
    assert is_right(task, 0, "it's 22")


@pytest.mark.parametrize(
    ("format_", "record", "said"),
    [
        ("gsm8k", {"question": "q", "answer": "5"}, "`answer`"),
        ("gsm8k", {"question": "", "answer": "#### 5"}, "`question`"),
        ("gsm8k", {"question": "q", "answer": "#### five"}, "holds no number"),
        ("humaneval", {"prompt": "p", "entry_point": "f", "test": "t"}, "`task_id` is missing"),
        ("humaneval", {**HUMANEVAL[0], "entry_point": "f; x"}, "`entry_point`"),
        ("humaneval", {**HUMANEVAL[0], "test": "def ("}, "no Python"),
        ("sciq", {**SCIQ[0], "distractor1": "planet 0"}, "two options that are the same"),
        ("bbh", {"input": "i"}, "`target` is missing"),
        ("jsonl", {"answer": "a"}, "one of `question`, `prompt` and `messages`"),
        ("jsonl", {"question": "q", "prompt": "p", "answer": "a"}, "no two of them"),
        ("jsonl", {"question": " ", "answer": "a"}, "nothing asked"),
        ("jsonl", {"messages": [], "answer": "a"}, "nothing asked"),
        ("jsonl", {"question": "q"}, "`answer` is missing"),
        ("jsonl", {"question": "q", "answer": None}, "`answer` is null"),
        ("jsonl", {"question": "q", "anwser": "a"}, "did you mean `answer`"),
        (
            "jsonl",
            {"messages": [{"role": "assistant", "content": "x"}], "answer": "a"},
            "the user's",
        ),
        ("jsonl", {"messages": [{"role": "tool", "content": "x"}], "answer": "a"}, "role"),
    ],
)
def test_records_are_checked(write: Write, format_: str, record: dict[str, Any], said: str) -> None:
    """What is missing or wrong is told, with its line."""
    path = write("bad.jsonl", [record])
    with pytest.raises(ValueError, match="line 1: ") as caught:
        load(path, format=format_, allow_code=True)
    assert said in str(caught.value)
    assert json.dumps(record) not in str(caught.value)
