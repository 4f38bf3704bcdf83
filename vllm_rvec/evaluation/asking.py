"""Asking every problem in every arm, over OpenAI's HTTP: so many at a time, again where it fails.

With aiohttp, which this package has anyway: of the `openai` client we would use two POSTs, and it
hides what has to be checked here, such as which alpha the answer's header says.

Not here: which arms there are (`arms`), how answers are graded (`scoring`) and kept (`answers`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import aiohttp
import blake3
from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_rvec.errors import ConfigError, FetchError
from vllm_rvec.evaluation.records import Answer, ArmKind
from vllm_rvec.vector.dial import ALPHA_HEADER

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence

    from vllm_rvec.evaluation.records import Arm, Grade, Half, Message, Problem, Task

    Grader = Callable[[Task, Problem, str], Grade]
    HalfOf = Callable[[str, str, int], Half]

__all__ = ["Asker", "Grader", "HalfOf", "Manner", "Question", "ask_all", "questions_of"]

logger = logging.getLogger(__name__)

CHAT_PATH: Final = "/v1/chat/completions"
COMPLETIONS_PATH: Final = "/v1/completions"

FIRST_WAIT_SECONDS: Final = 0.5
LONGEST_WAIT_SECONDS: Final = 30.0
LONGEST_ASKED_WAIT_SECONDS: Final = 300.0
"""Of a `Retry-After`; a server that asks for more is as good as gone."""

PASSING: Final = frozenset({408, 409, 425, 429})
"""Statuses below 500 that another try may get over."""

WARN_SECONDS: Final = 30.0
"""How often a failure is told that another try may get over: all that are under way have it."""

MAX_ANSWER_BYTES: Final = 16 * 2**20
SHOWN_CHARACTERS: Final = 500


@dataclass(frozen=True, slots=True)
class Question:
    """One problem in one arm."""

    arm: Arm
    task: Task
    problem: Problem
    half: Half
    seed: int
    """Of the sampling: the same in all arms but the repeat, whose noise is to be seen."""

    @property
    def path(self) -> str:
        """Where it is asked."""
        return COMPLETIONS_PATH if self.problem.prompt is not None else CHAT_PATH

    @property
    def label(self) -> str:
        """For messages."""
        return f"problem {self.problem.id} of {self.task.name}, arm {self.arm.name}"

    def body(self, temperature: float) -> dict[str, object]:
        """What is sent."""
        body: dict[str, object] = {
            "model": self.arm.model,
            "max_tokens": self.task.max_tokens,
            "temperature": temperature,
            "seed": self.seed,
        }
        if self.task.stop:
            body["stop"] = list(self.task.stop)
        if self.arm.alphas is not None:
            alphas = self.arm.alphas
            body["alpha"] = alphas if isinstance(alphas, float | int) else dict(alphas)
        thought = self.task.thinking_prompt if self.arm.is_prompted else ""
        if self.problem.prompt is not None:
            return body | {"prompt": _prompt_with(self.problem.prompt, thought)}
        return body | {"messages": _messages_with(self.problem.messages, thought)}


def questions_of(
    arms: Sequence[Arm],
    tasks: Sequence[Task],
    *,
    seed: int,
    half_of: HalfOf,
    known: Iterable[tuple[str, str, str]] = (),
) -> list[Question]:
    """List what is to be asked: problem by problem, each in all arms, so that drift hits all alike.

    Args:
        arms: The arms of one stage.
        tasks: What is asked.
        seed: Decides the order of the problems and of the arms within each, and the requests'
            seeds.
        half_of: Says which half a problem belongs to.
        known: What has been answered: arm, task and problem.
    """
    rng = random.Random(seed)  # noqa: S311 - an order, not a secret
    problems = [(task, problem) for task in tasks for problem in task.problems]
    rng.shuffle(problems)
    answered = set(known)
    questions: list[Question] = []
    for task, problem in problems:
        half = half_of(task.name, problem.id, seed)
        for arm in rng.sample(arms, len(arms)):
            if (arm.name, task.name, problem.id) not in answered:
                own = _seed(seed, task.name, problem.id, is_repeat=arm.kind is ArmKind.REPEAT)
                questions.append(Question(arm, task, problem, half, own))
    return questions


def _seed(seed: int, task: str, problem: str, *, is_repeat: bool) -> int:
    text = "\0".join([str(seed), task, problem, "repeat" if is_repeat else ""])
    return int.from_bytes(blake3.blake3(text.encode()).digest(length=4), "big") >> 1


def _prompt_with(prompt: str, thought: str) -> str:
    return f"{prompt}\n{thought}" if thought else prompt


def _messages_with(messages: Sequence[Message], thought: str) -> list[dict[str, str]]:
    """Add the thinking prompt behind the last user's message."""
    said = [{"role": message.role, "content": message.content} for message in messages]
    if thought:
        last = next((one for one in reversed(said) if one["role"] == "user"), said[-1])
        last["content"] = f"{last['content']}\n{thought}"
    return said


@dataclass(frozen=True, slots=True)
class Manner:
    """How requests are made."""

    base_url: str
    """Without /v1."""
    key: str | None = None
    """Sent as `Authorization: Bearer`."""
    temperature: float = 0.0
    retries: int = 8
    timeout_seconds: float = 600.0
    """For one answer."""
    until_ready: Callable[[], Awaitable[None]] | None = None
    """Waited for before another try: an engine of ours may be starting again."""
    first_wait_seconds: float = FIRST_WAIT_SECONDS

    @property
    def headers(self) -> dict[str, str]:
        """Who asks."""
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}


class _PassingError(Exception):
    """A try that failed in a way that another may not."""

    def __init__(self, why: str, wait_seconds: float | None = None) -> None:
        super().__init__(why)
        self.wait_seconds = wait_seconds


class _Parts(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Said(_Parts):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(_Parts):
    message: _Said | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Usage(_Parts):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0


class _Reply(_Parts):
    choices: list[_Choice]
    usage: _Usage = _Usage()


class Asker:
    """Asks questions.

    Args:
        session: Closed by the caller.
        manner: How.
        grade: Compares an answer with what was expected; called in a thread, for unit tests take
            their time.
    """

    def __init__(self, session: aiohttp.ClientSession, manner: Manner, grade: Grader) -> None:
        self._session = session
        self._manner = manner
        self._grade = grade
        self._warned_at = -math.inf

    async def ask(self, question: Question) -> Answer:
        """Ask until there is an answer, and grade it.

        Raises:
            FetchError: All tries failed.
            ConfigError: The server refuses the question itself, or has another alpha than it is
                asked for.
        """
        body = question.body(self._manner.temperature)
        tries = 0
        while True:
            tries += 1
            started_at = time.monotonic()
            try:
                reply = await self._try(question, body)
                break
            except _PassingError as exc:
                if tries > self._manner.retries:
                    raise self._gave_up(question, tries, str(exc)) from exc
                await self._wait(question, tries, exc)
        seconds = time.monotonic() - started_at
        return await self._graded(question, reply, seconds, tries)

    async def _wait(self, question: Question, tries: int, exc: _PassingError) -> None:
        doubled = self._manner.first_wait_seconds * 2 ** min(tries - 1, 16)
        # Spread by the question's own seed: all that failed together must not come back together.
        spread = 0.75 + 0.5 * (question.seed % 1009) / 1009
        wait = min(doubled, LONGEST_WAIT_SECONDS) * spread
        if exc.wait_seconds is not None:
            wait = max(wait, exc.wait_seconds)
        if time.monotonic() - self._warned_at > WARN_SECONDS:
            self._warned_at = time.monotonic()
            logger.warning("%s: %s; again in %.1f s", question.label, exc, wait)
        await asyncio.sleep(wait)
        if self._manner.until_ready is not None:
            await self._manner.until_ready()

    def _gave_up(self, question: Question, tries: int, why: str) -> FetchError:
        return FetchError(
            f"{self._manner.base_url} no longer answers",
            why=f"{question.label}: {why}, in {tries} tries",
            fix="see to the server, then run the same command again: it goes on where this one "
            "stopped",
        )

    async def _try(self, question: Question, body: Mapping[str, object]) -> _Reply:
        try:
            async with self._session.post(
                self._manner.base_url + question.path,
                json=body,
                headers=self._manner.headers,
                timeout=aiohttp.ClientTimeout(total=self._manner.timeout_seconds),
                allow_redirects=False,  # one would take the key to where it doesn't belong
            ) as response:
                data = await _read(response)
                self._check_status(question, response, data)
                self._check_alpha(question, response.headers.get(ALPHA_HEADER))
        except TimeoutError as exc:
            why = f"no answer within {self._manner.timeout_seconds:g} s"
            raise _PassingError(why) from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise _PassingError(f"{type(exc).__name__}: {exc}"[:SHOWN_CHARACTERS]) from exc
        return self._parsed(data)

    def _check_status(
        self, question: Question, response: aiohttp.ClientResponse, data: bytes
    ) -> None:
        if response.status == 200:
            return
        said = _error_text(data)
        if response.status in PASSING or response.status >= 500:
            why = f"HTTP status {response.status}: {said}"
            raise _PassingError(why, _asked_wait(response.headers.get("Retry-After")))
        fix = (
            "name the environment variable that holds a key of the server's: `api_key_env`"
            if response.status in {401, 403}
            else "mend the cause (a longer `max-model-len`, a smaller `max_tokens`, the problem's "
            "own text), then run the same command again: it goes on where this one stopped"
        )
        raise ConfigError(
            f"{self._manner.base_url} refuses {question.label}",
            why=f"HTTP status {response.status}: {said}",
            fix=fix,
        )

    def _check_alpha(self, question: Question, said: str | None) -> None:
        """Make sure that the answer has the alpha of its arm: variants can be changed live."""
        asked = question.arm.alphas if question.arm.alphas is not None else question.arm.alpha
        if said is None or _is_same(said, asked):
            return
        raise ConfigError(
            f"{self._manner.base_url} answered {question.label} at another alpha",
            why=f"its header says {ALPHA_HEADER}: {said[:SHOWN_CHARACTERS]}",
            fix="keep the variants as they are, and without fallback, while a sweep asks them; "
            "then run the same command again",
        )

    def _parsed(self, data: bytes) -> _Reply:
        try:
            reply = _Reply.model_validate_json(data)
        except ValidationError as exc:
            raise _PassingError("the answer is not OpenAI's form") from exc
        if not reply.choices:
            raise _PassingError("the answer has no choice")
        return reply

    async def _graded(
        self, question: Question, reply: _Reply, seconds: float, tries: int
    ) -> Answer:
        choice, problem = reply.choices[0], question.problem
        said = choice.message or _Said(content=choice.text)
        text = said.content or ""
        grade = await asyncio.to_thread(self._grade, question.task, problem, text)
        return Answer(
            arm=question.arm.name,
            task=question.task.name,
            problem=problem.id,
            family=problem.family,
            half=question.half,
            text=text,
            finish_reason=choice.finish_reason or "",
            prompt_tokens=reply.usage.prompt_tokens,
            completion_tokens=reply.usage.completion_tokens or 0,
            seconds=seconds,
            grade=grade,
            reasoning=said.reasoning or said.reasoning_content or "",
            tries=tries,
        )


async def ask_all(
    questions: Sequence[Question],
    asker: Asker,
    keep: Callable[[Answer], None],
    *,
    concurrency: int,
) -> None:
    """Ask all, so many at a time; `keep` gets each answer as it comes.

    Raises:
        RvecError: As `Asker.ask`; the others are given up, what has been kept stays.
    """
    waiting = iter(questions)
    workers = [
        asyncio.create_task(_work(waiting, asker, keep))
        for _ in range(min(concurrency, len(questions)))
    ]
    if not workers:
        return
    try:
        await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        for worker in workers:
            if worker.done():
                worker.result()
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _work(waiting: Iterator[Question], asker: Asker, keep: Callable[[Answer], None]) -> None:
    for question in waiting:
        keep(await asker.ask(question))


async def _read(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise _PassingError("the answer is too long")
    return bytes(body)


def _asked_wait(text: str | None) -> float | None:
    """Read `Retry-After` in seconds; dates are rare, and our own doubling does for them."""
    try:
        seconds = float(text or "")
    except ValueError:
        return None
    return seconds if 0 <= seconds <= LONGEST_ASKED_WAIT_SECONDS else None


class _ErrorText(_Parts):
    message: str


class _ErrorBody(_Parts):
    error: _ErrorText


def _error_text(data: bytes) -> str:
    try:
        said = _ErrorBody.model_validate_json(data).error.message
    except ValidationError:
        said = data.decode(errors="replace")
    return said[:SHOWN_CHARACTERS]


def _is_same(said: str, asked: float | Mapping[str, float]) -> bool:
    try:
        found = _alphas_of(said)
    except ValueError:
        return False
    if isinstance(asked, float | int) or isinstance(found, float):
        return found == asked
    return {name: alpha for name, alpha in found.items() if alpha} == dict(asked)


def _alphas_of(said: str) -> float | dict[str, float]:
    """Read the header: `0.35`, or `reasoning=0.7, style=-0.2`."""
    if "=" not in said:
        return float(said)
    pairs = (part.partition("=") for part in said.split(","))
    return {name.strip(): float(number) for name, _, number in pairs}
