"""vllm_rvec.evaluation.asking: what is sent, again where it fails, and never a wrong alpha."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import aiohttp
import pytest
from aiohttp import web

from tests.support.stand_in_api import Asked, StandIn, run_stand_in
from vllm_rvec.errors import ConfigError, FetchError, RvecError
from vllm_rvec.evaluation.asking import Asker, Manner, Question, ask_all, questions_of
from vllm_rvec.evaluation.records import Answer, Arm, ArmKind, Grade, Half, Message, Problem, Task

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BASE = Arm("base", ArmKind.BASE, 0.0, "base", 0.0)
HALF = Arm("v@0.5", ArmKind.VECTOR, 0.5, "base", {"vector": 0.5})
PROMPT = Arm("base+prompt", ArmKind.BASE_PROMPT, 0.0, "base", 0.0, is_prompted=True)
REPEAT = Arm("repeat", ArmKind.REPEAT, 0.0, "base", 0.0)
NAMED = Arm("v@1", ArmKind.VECTOR, 1.0, "enhanced@1")
ARMS = (BASE, HALF, PROMPT, REPEAT)

PROBLEMS = tuple(
    Problem(str(n), str(n), messages=(Message("system", "Be brief."), Message("user", f"Say {n}")))
    for n in range(20)
)
TASK = Task("numbers", PROBLEMS, "exact", max_tokens=7, stop=("\n\n",))


def grade(task: Task, problem: Problem, text: str) -> Grade:
    del task
    return Grade(text == problem.answer, text)


def half_of(task: str, problem: str, seed: int) -> Half:
    del task, seed
    return "choose" if int(problem) % 2 else "confirm"


def questions(
    arms: Sequence[Arm] = ARMS, seed: int = 0, tasks: Sequence[Task] = (TASK,)
) -> list[Question]:
    return questions_of(arms, tasks, seed=seed, half_of=half_of)


@pytest.fixture
def server() -> Iterator[StandIn]:
    with run_stand_in(lambda asked: asked.text.removeprefix("Say ")) as running:
        yield running


def ask(
    server: StandIn, asked: Sequence[Question], concurrency: int = 8, **how: object
) -> list[Answer]:
    """Ask, and return what was kept; an error has what was kept before it as `kept`."""
    kept: list[Answer] = []
    manner = Manner(server.url, first_wait_seconds=0.01, **how)  # type: ignore[arg-type]

    async def run() -> None:
        async with aiohttp.ClientSession() as session:
            await ask_all(
                asked, Asker(session, manner, grade), kept.append, concurrency=concurrency
            )

    try:
        asyncio.run(run())
    except RvecError as exc:
        exc.kept = kept  # type: ignore[attr-defined]
        raise
    return kept


def test_each_problem_is_asked_once_in_each_arm(server: StandIn) -> None:
    """And comes back with its arm, half and grade."""
    answers = ask(server, questions())
    assert Counter((a.arm, a.problem) for a in answers) == {
        (arm.name, problem.id): 1 for arm in ARMS for problem in PROBLEMS
    }
    assert {a.half for a in answers if int(a.problem) % 2} == {"choose"}
    assert all(a.is_correct for a in answers if a.arm == "base")
    one = next(a for a in answers if (a.arm, a.problem) == ("base", "3"))
    assert (one.task, one.text, one.finish_reason, one.tries) == ("numbers", "3", "stop", 1)
    assert (one.prompt_tokens, one.completion_tokens) == (2, 1)


def test_what_is_sent(server: StandIn) -> None:
    """The alpha in the body, greedy, with the task's limits and the key."""
    ask(server, questions([HALF])[:1], key="secret")
    (sent,) = server.asked
    assert sent.path == "/v1/chat/completions"
    assert sent.authorization == "Bearer secret"
    problem = sent.text.removeprefix("Say ")
    seed = sent.body.pop("seed")
    assert isinstance(seed, int)
    assert sent.body == {
        "model": "base",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Say {problem}"},
        ],
        "max_tokens": 7,
        "temperature": 0.0,
        "stop": ["\n\n"],
        "alpha": {"vector": 0.5},
    }


def test_a_variant_that_is_named_gets_no_alpha(server: StandIn) -> None:
    """Its name says it; an engine that is fused would not understand."""
    ask(server, questions([NAMED])[:1])
    assert server.asked[0].body["model"] == "enhanced@1"
    assert "alpha" not in server.asked[0].body


def test_the_thinking_prompt_stands_behind_the_last_users_message(server: StandIn) -> None:
    """Also where an assistant's beginning follows; not where the arm has none."""
    begun = (Message("user", "Say 1"), Message("assistant", "I say"))
    tasks = [replace(TASK, problems=(Problem("1", "1", messages=begun),))]
    ask(server, questions([PROMPT], tasks=tasks))
    said = server.asked[0].body["messages"]
    assert said[0]["content"] == "Say 1\nThink step by step."
    assert said[1]["content"] == "I say"


def test_a_plain_prompt_is_completed(server: StandIn) -> None:
    """Over the other path, as it is."""
    tasks = [replace(TASK, problems=(Problem("1", "1", prompt="Say 1"),))]
    (answer,) = ask(server, questions([BASE], tasks=tasks))
    assert server.asked[0].path == "/v1/completions"
    assert server.asked[0].body["prompt"] == "Say 1"
    assert answer.text == "1"


def test_seeds_are_a_problems_own_in_all_arms_but_the_repeat() -> None:
    """So that arms are paired in their chance too, and the repeat shows what chance does."""
    by_problem: dict[str, dict[str, int]] = {}
    for question in questions():
        by_problem.setdefault(question.problem.id, {})[question.arm.name] = question.seed
    for seeds in by_problem.values():
        assert seeds["base"] == seeds["v@0.5"] == seeds["base+prompt"] != seeds["repeat"]
    assert len({seeds["base"] for seeds in by_problem.values()}) == len(PROBLEMS)
    assert questions(seed=1)[0].seed != questions(seed=0)[0].seed
    assert all(0 <= question.seed < 2**31 for question in questions())


def test_arms_are_asked_side_by_side() -> None:
    """Problem after problem, each in all arms, in an order that the seed decides."""
    order = questions()
    groups = [order[at : at + len(ARMS)] for at in range(0, len(order), len(ARMS))]
    assert all(len({question.problem.id for question in group}) == 1 for group in groups)
    names = {arm.name for arm in ARMS}
    assert all({question.arm.name for question in group} == names for group in groups)
    assert len({tuple(question.arm.name for question in group) for group in groups}) > 3
    assert order == questions()
    assert [q.problem.id for q in order] != [q.problem.id for q in questions(seed=1)]


def test_what_is_known_is_not_asked_and_changes_no_seed() -> None:
    """A sweep that goes on asks as it would have."""
    whole = questions()
    known = [(q.arm.name, q.task.name, q.problem.id) for q in whole[:33]]
    rest = questions_of(ARMS, [TASK], seed=0, half_of=half_of, known=known)
    assert rest == whole[33:]


def test_no_more_are_under_way_than_allowed(server: StandIn) -> None:
    """However many there are."""
    server.delay_seconds = 0.01
    ask(server, questions(), concurrency=3)
    assert server.most_at_once == 3


@pytest.mark.parametrize("status", [429, 500, 502, 503, 408])
def test_a_failure_that_passes_is_tried_again(server: StandIn, status: int) -> None:
    """And counted."""
    seen: Counter[str] = Counter()

    def fail(asked: Asked) -> web.Response | None:
        seen[asked.text] += 1
        return web.Response(status=status) if seen[asked.text] < 3 else None

    server.fail = fail
    answers = ask(server, questions([BASE]))
    assert {answer.tries for answer in answers} == {3}
    assert all(answer.is_correct for answer in answers)


def test_retry_after_is_waited_for(server: StandIn) -> None:
    """Where it is longer than our own wait."""
    is_first = threading.Event()

    def fail(_: Asked) -> web.Response | None:
        if is_first.is_set():
            return None
        is_first.set()
        return web.Response(status=429, headers={"Retry-After": "0.4"})

    server.fail = fail
    began_at = time.monotonic()
    ask(server, questions([BASE])[:1])
    assert time.monotonic() - began_at >= 0.4


def test_a_broken_answer_is_tried_again(server: StandIn) -> None:
    """Half a body, or another form than OpenAI's."""
    bodies = iter(["{", '{"choices": []}', '{"error": 1}', "[]"])

    def fail(_: Asked) -> web.Response | None:
        body = next(bodies, None)
        return None if body is None else web.Response(text=body)

    server.fail = fail
    (answer,) = ask(server, questions([BASE])[:1])
    assert answer.tries == 5


def test_a_server_that_is_gone_ends_it_with_all_that_was_kept(server: StandIn) -> None:
    """With what to do."""

    def fail(_: Asked) -> web.Response | None:
        return web.Response(status=503, text="down") if len(server.asked) >= 10 else None

    server.fail = fail
    with pytest.raises(FetchError, match="no longer answers") as stopped:
        ask(server, questions(), concurrency=1, retries=2)
    assert "HTTP status 503: down, in 3 tries" in stopped.value.why
    assert "run the same command again" in str(stopped.value)
    assert len(stopped.value.kept) == 10  # type: ignore[attr-defined]


def test_a_refused_connection_is_tried_again_and_then_said() -> None:
    """The server ended between the questions."""
    with run_stand_in(lambda _: "") as server:
        pass
    with pytest.raises(FetchError, match=r"no longer answers(.|\n)*in 2 tries"):
        ask(server, questions()[:4], retries=1)


def test_an_answer_that_takes_too_long_is_given_up(server: StandIn) -> None:
    """After the time that was set."""
    server.delay_seconds = 5
    with pytest.raises(FetchError, match=r"no answer within 0\.1 s"):
        ask(server, questions()[:1], retries=0, timeout_seconds=0.1)


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_not_repeated(server: StandIn, status: int) -> None:
    """It names the problem, in the server's words."""
    body = {"error": {"message": "too long"}}
    tries: list[Asked] = []

    def fail(asked: Asked) -> web.Response:
        tries.append(asked)
        return web.json_response(body, status=status)

    server.fail = fail
    match = rf"refuses problem \d+ of numbers, arm base(.|\n)*{status}: too long"
    with pytest.raises(ConfigError, match=match):
        ask(server, questions([BASE])[:1])
    assert len(tries) == 1


@pytest.mark.parametrize(
    ("arm", "said", "is_right"),
    [
        (BASE, "0", True),
        (BASE, "0.5", False),
        (HALF, "vector=0.5, random=0", True),
        (HALF, "vector=0.5, random=1", False),
        (HALF, "0.5", False),
        (NAMED, "1", True),
        (NAMED, "0.7", False),
        (NAMED, "what?", False),
    ],
)
def test_an_answer_at_another_alpha_ends_it(
    server: StandIn, arm: Arm, said: str, is_right: bool
) -> None:
    """Somebody changed the variant, or its fallback answered: the arm would be a mixture."""
    server.headers = {"X-Rvec-Alpha": said}
    if is_right:
        assert len(ask(server, questions([arm])[:1])) == 1
        return
    with pytest.raises(ConfigError, match="at another alpha"):
        ask(server, questions([arm])[:1])


def test_before_another_try_a_restarting_engine_is_waited_for(server: StandIn) -> None:
    """Tries are not used up while it starts."""
    waited: list[int] = []

    async def until_ready() -> None:
        waited.append(len(waited))

    def fail(_: Asked) -> web.Response | None:
        return web.Response(status=503) if len(waited) < 1 else None

    server.fail = fail
    (answer,) = ask(server, questions([BASE])[:1], until_ready=until_ready)
    assert (answer.tries, waited) == (2, [0])


def test_reasoning_that_came_apart_is_kept_apart(server: StandIn) -> None:
    """Under either name; the text may be empty."""
    said = {"content": None, "reasoning_content": "hm"}
    reply = {"choices": [{"message": said, "finish_reason": "length"}]}
    server.fail = lambda _: web.json_response(reply)
    (answer,) = ask(server, questions([BASE])[:1])
    assert (answer.text, answer.reasoning) == ("", "hm")
    assert answer.is_cut_off


def test_a_failure_is_told_once_for_all_that_have_it(
    server: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody who waits wants to know why."""
    failed: set[str] = set()

    def fail(asked: Asked) -> web.Response | None:
        is_first = asked.text not in failed
        failed.add(asked.text)
        return web.Response(status=503, text="busy") if is_first else None

    server.fail = fail
    ask(server, questions([BASE]))
    (told,) = caplog.messages
    assert "HTTP status 503: busy; again in" in told
