"""The README's headline table, asked again: the real engine, our router, the `openai` client."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.conftest import DEMO
from vllm_rvec.evaluation.scoring import grade
from vllm_rvec.evaluation.tasks import TaskSpec, load_task
from vllm_rvec.intervals import wilson

if TYPE_CHECKING:
    import openai

    from vllm_rvec.evaluation.records import Problem, Task

pytestmark = pytest.mark.engine

PATTERN = r"(?:^|\s)Answer: ([^:]*)\Z"
"""As in sweep.yaml."""

ASKED = 120
"""Of the table's 600 chains."""

MODELS = {"-v": "enhanced@-1", "base": "base", "v@0.5": "enhanced@0.5", "v@1": "enhanced@1"}
"""The table's arms, and what the router calls them."""


@pytest.fixture(scope="module")
def chains() -> Task:
    """Those of the table, graded as in the table."""
    spec = TaskSpec(
        path=str(DEMO / "tasks" / "chain.jsonl"), scorer="regex", options={"pattern": PATTERN}
    )
    return load_task(spec)


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    found = json.loads((DEMO / "served.json").read_text())
    return {row["arm"]: row["accuracy"]["chain"] for row in found["arms"]}


def answer(client: openai.OpenAI, model: str, problem: Problem) -> str:
    messages: Any = [{"role": one.role, "content": one.content} for one in problem.messages]
    said = client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=64
    )
    return said.choices[0].message.content or ""


@pytest.mark.parametrize("arm", MODELS)
def test_the_table_is_what_the_openai_client_gets(
    client: openai.OpenAI, chains: Task, table: dict[str, Any], arm: str
) -> None:
    """On a part of the problems, so within that part's interval."""
    problems = chains.problems[:ASKED]
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(lambda one: answer(client, MODELS[arm], one), problems))
    right = [grade(chains, p, text).is_correct for p, text in zip(problems, texts, strict=True)]
    found = wilson(sum(right), ASKED)
    assert found is not None
    assert found.low <= table[arm]["value"] <= found.high
