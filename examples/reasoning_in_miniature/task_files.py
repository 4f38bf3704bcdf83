"""Write the held-out problems as the files that `vllm-rvec sweep` asks: see `sweep.yaml`.

    python examples/reasoning_in_miniature/task_files.py

They are the very problems that `evaluation.py` asks for `results.json`, so that the two tables can
be compared. Needs no model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from chat_tokenizer import chat_prompt
from evaluation import draw_problems

if TYPE_CHECKING:
    from tasks import Problem

__all__ = ["task_files", "write_task_files"]


def main() -> None:
    """Write `tasks/` beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    write_task_files(Path(__file__).resolve().parent / "tasks", parser.parse_args().seed)


def write_task_files(folder: Path, seed: int) -> None:
    """Write one `.jsonl` for each group of problems."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in task_files(seed).items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def task_files(seed: int) -> dict[str, list[dict[str, object]]]:
    """Make the lines of every file, by the file's name.

    `chain_steps` has the problems of `chain`, their replies begun with the number that the steps
    begin with: the model can't but go on with the steps. It tells elicitation from skill.
    """
    problems = draw_problems(seed)
    files = {group: [_asked(problem) for problem in found] for group, found in problems.items()}
    return files | {"chain_steps": [_begun(problem) for problem in problems["chain"]]}


def _asked(problem: Problem) -> dict[str, object]:
    messages = [{"role": "user", "content": problem.question}]
    return {"id": problem.key, "messages": messages, **_graded(problem)}


def _begun(problem: Problem) -> dict[str, object]:
    start = problem.work.partition(" ")[0]
    return {
        "id": problem.key,
        "prompt": chat_prompt(problem.question) + start,
        **_graded(problem),
    }


def _graded(problem: Problem) -> dict[str, object]:
    return {"answer": problem.answer, "family": problem.family}


if __name__ == "__main__":
    main()
