"""Synthetic problems for the demo: their wordings, worked solutions, split and grader.

Not for tokens or tensors: everything here is text and the standard library.

Every family comes in two wordings. The RL donor is trained on wording S only and the target on
wording T only, so whatever the vector carries over has to survive the change of wording.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

__all__ = [
    "OTHER_FAMILIES",
    "REASONING_FAMILIES",
    "Family",
    "Problem",
    "Split",
    "Wording",
    "chain_value",
    "draw_distinct",
    "draw_problem",
    "is_correct",
    "response",
    "split_of",
    "worked_probability",
]

Family = Literal["chain", "count", "max", "copy", "reverse", "sort", "compare"]
Wording = Literal["S", "T"]
Split = Literal["train", "held_out"]

REASONING_FAMILIES: tuple[Family, ...] = ("chain", "count", "max")
"""Families that have a worked solution and that GRPO rewards."""

OTHER_FAMILIES: tuple[Family, ...] = ("copy", "reverse", "sort", "compare")
"""Families answered at once, never rewarded: they show what the vector damages."""

HELD_OUT_ONE_IN = 10
"""One problem in ten is held out, in both wordings at once."""

LETTERS = "abcdefghij"
NAMES = ("Leo", "Mia", "Ben", "Ana", "Sam", "Zoe")
ITEMS = ("apples", "pens", "coins", "books", "cards")


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its answer and, for the reasoning families, the steps to it."""

    family: Family
    wording: Wording
    question: str
    answer: str
    work: str
    """The worked steps, without the final `Answer: ...`; empty for the other families."""
    difficulty: float
    """0 for the shortest problem of the family, 1 for the longest."""
    key: str
    """What is asked, free of wording, name and item. The split hashes this."""


def split_of(key: str) -> Split:
    """Tell which side of the split a problem is on, from a SHA-256 of its key.

    >>> split_of("chain 46+5-8") == split_of("chain 46+5-8")
    True
    """
    digest = hashlib.sha256(key.encode()).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0 else "train"


def draw_problem(rng: random.Random, family: Family, wording: Wording, split: Split) -> Problem:
    """Draw one problem of a family from one side of the split, by rejection."""
    while True:
        problem = _MAKERS[family](rng, wording)
        if split_of(problem.key) == split:
            return problem


def draw_distinct(
    rng: random.Random, families: Sequence[Family], wording: Wording, split: Split, count: int
) -> list[Problem]:
    """Draw `count` problems with pairwise different keys, the families in turn."""
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        family = families[len(problems) % len(families)]
        problem = draw_problem(rng, family, wording, split)
        problems.setdefault(problem.key, problem)
    return list(problems.values())


def response(problem: Problem, *, is_worked: bool) -> str:
    """Write the reply to a problem: `46 +5=51 -8=43. Answer: 43`, or the last part alone."""
    final = f"Answer: {problem.answer}"
    return f"{problem.work} {final}" if is_worked and problem.work else final


def worked_probability(problem: Problem) -> float:
    """How often the SFT and target data show the steps: often if easy, rarely if hard.

    A logistic curve through 1/2 at difficulty 0.5. Asked greedily, a model tuned on this shows its
    steps on many short problems and guesses on the long ones, which leaves the vector room both
    ways. Through 0.375 and half as steep it guessed nearly always: 9 % right instead of 37 %.
    """
    return 1.0 / (1.0 + math.exp(6.0 * (problem.difficulty - 0.5)))


def is_correct(text: str, answer: str) -> bool:
    """Grade a reply: it must end in `Answer: ` and exactly the right answer.

    >>> is_correct("46 +5=51 -8=43. Answer: 43", "43"), is_correct("Answer: 430", "43")
    (True, False)
    """
    found = re.search(r"(?:^|\s)Answer: ([^:]*)\Z", text)
    return found is not None and found.group(1) == answer


def chain_value(question: str) -> int:
    """Compute the answer of a chain question, in either wording, from its text alone.

    Independent of the generator, so that a test or a reader can check one against the other.
    """
    total = int(re.findall(r"\d+", question)[0])
    for verb, amount in re.findall(r"(Add|Take|Gets|Gives) (\d+)", question):
        total += int(amount) if verb in ("Add", "Gets") else -int(amount)
    return total


def _make_chain(rng: random.Random, wording: Wording) -> Problem:
    length = rng.randint(2, 6)
    start = total = rng.randint(10, 90)
    amounts: list[int] = []
    work = [str(start)]
    for _ in range(length):
        amount = rng.randint(1, 9) * rng.choice((-1, 1))
        if not 0 <= total + amount <= 99:
            amount = -amount
        total += amount
        amounts.append(amount)
        work.append(f"{amount:+d}={total}")
    if wording == "S":
        steps = " ".join(f"{'Add' if a > 0 else 'Take'} {abs(a)}." for a in amounts)
        question = f"Start with {start}. {steps} What is the result?"
    else:
        steps = " ".join(f"{'Gets' if a > 0 else 'Gives'} {abs(a)}." for a in amounts)
        name, item = rng.choice(NAMES), rng.choice(ITEMS)
        question = f"{name} has {start} {item}. {steps} How many {item} now?"
    return Problem(
        family="chain",
        wording=wording,
        question=question,
        answer=str(total),
        work=" ".join(work) + ".",
        difficulty=(length - 2) / 4,
        key=f"chain {start}" + "".join(f"{a:+d}" for a in amounts),
    )


def _make_count(rng: random.Random, wording: Wording) -> Problem:
    length = rng.randint(4, 8)
    alphabet = rng.sample(LETTERS, 3)
    wanted = alphabet[0]
    letters = [rng.choice(alphabet) for _ in range(length)]
    running = [f"{c}{letters[: i + 1].count(wanted)}" for i, c in enumerate(letters)]
    listed = " ".join(letters)
    question = (
        f"How many {wanted} are in {listed}?"
        if wording == "S"
        else f"Count each {wanted} you see: {listed}."
    )
    return Problem(
        family="count",
        wording=wording,
        question=question,
        answer=str(letters.count(wanted)),
        work=" ".join(running) + ".",
        difficulty=(length - 4) / 4,
        key=f"count {wanted} {listed}",
    )


def _make_max(rng: random.Random, wording: Wording) -> Problem:
    length = rng.randint(3, 7)
    numbers = rng.sample(range(10, 100), length)
    running = [str(max(numbers[: i + 1])) for i in range(length)]
    listed = " ".join(map(str, numbers))
    question = (
        f"Largest of {listed}?" if wording == "S" else f"Which number is the biggest: {listed}?"
    )
    return Problem(
        family="max",
        wording=wording,
        question=question,
        answer=str(max(numbers)),
        work=" ".join(running) + ".",
        difficulty=(length - 3) / 4,
        key=f"max {listed}",
    )


def _make_copy(rng: random.Random, wording: Wording) -> Problem:
    listed = " ".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 6)))
    question = f"Copy {listed}." if wording == "S" else f"Say again: {listed}."
    return _direct("copy", wording, question, listed, listed)


def _make_reverse(rng: random.Random, wording: Wording) -> Problem:
    letters = [rng.choice(LETTERS) for _ in range(rng.randint(3, 6))]
    listed = " ".join(letters)
    question = f"Reverse {listed}." if wording == "S" else f"Say it backwards: {listed}."
    return _direct("reverse", wording, question, " ".join(reversed(letters)), listed)


def _make_sort(rng: random.Random, wording: Wording) -> Problem:
    digits = [rng.randint(0, 9) for _ in range(rng.randint(3, 5))]
    listed = " ".join(map(str, digits))
    question = f"Sort {listed}." if wording == "S" else f"Put in order: {listed}."
    return _direct("sort", wording, question, " ".join(map(str, sorted(digits))), listed)


def _make_compare(rng: random.Random, wording: Wording) -> Problem:
    left, right = rng.sample(range(10, 100), 2)
    question = (
        f"Is {left} more than {right}?" if wording == "S" else f"Does {left} come after {right}?"
    )
    return _direct("compare", wording, question, "yes" if left > right else "no", f"{left} {right}")


def _direct(family: Family, wording: Wording, question: str, answer: str, content: str) -> Problem:
    return Problem(family, wording, question, answer, "", 0.0, f"{family} {content}")


_MAKERS: dict[Family, Callable[[random.Random, Wording], Problem]] = {
    "chain": _make_chain,
    "count": _make_count,
    "max": _make_max,
    "copy": _make_copy,
    "reverse": _make_reverse,
    "sort": _make_sort,
    "compare": _make_compare,
}
