"""Small files in the public formats. The items are our own."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Write = Callable[..., Path]

GSM8K = [
    {
        "question": "Uma bakes 4 trays of 6 rolls and eats 2. How many rolls are left?",
        "answer": "She bakes 4 * 6 = <<4*6=24>>24.\n24 - 2 = <<24-2=22>>22 are left.\n#### 22",
    },
    {
        "question": "A lamp costs $1,150. How much are two?",
        "answer": "2 * 1150 = <<2*1150=2300>>2300\n#### 2,300",
    },
    {"question": "Pia is 3, twice as old as Tom. How old is Tom?", "answer": "3 / 2\n#### 1.5"},
]
HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'def triple(n: int) -> int:\n    """Return three times n."""\n',
        "entry_point": "triple",
        "canonical_solution": "    return 3 * n\n",
        "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(2) == 6\n",
    }
]
SCIQ = [
    {
        "question": f"Which planet is number {n} from the sun?",
        "distractor1": "a comet",
        "distractor2": "a star",
        "distractor3": "a moon",
        "correct_answer": f"planet {n}",
        "support": "Planets are counted from the sun.",
    }
    for n in range(40)
]
BBH = [
    {"input": "Which is red?\nOptions:\n(A) grass\n(B) blood", "target": "(B)"},
    {"input": "not ( False ) is", "target": "True"},
]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write records into a file, in the form that its name asks for."""

    def written(name: str, records: list[Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(record) + "\n" for record in records).encode()
        if name.endswith(".json"):
            path.write_text(json.dumps({"canary": "x", "examples": records}))
        elif name.endswith(".gz"):
            path.write_bytes(gzip.compress(lines))
        else:
            path.write_bytes(lines)
        return path

    return written
