"""A dial beside N fused engines and a plain one, on the same machine, under the same load.

Run by `make bench-dial`; alone: `python -m benchmarks.dial`. A dial is one engine that holds theta
and v, and answers any alpha for each request; without it, each alpha is an engine of its own. Every
engine is a process; all are up together, and those that are compared answer in turn. The N fused
engines answer at the same time, on the same cores, each with a share of the threads, which serves
them best. Their seconds end with the last of them.

In float32 the greedy tokens of a dial have to be those of the fused engines, and their logarithmic
probabilities far nearer to a fused engine's than alpha 0 is; else there is no measurement. In
bfloat16 the two round differently, so nothing is compared. Most CPUs have no bfloat16 of their own:
their products are then bound by what stands in for it, not by bytes.
"""

from __future__ import annotations

import os
import statistics
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import psutil
from rich.console import Console

from benchmarks.answering import Batch, Setup, answer_at_once, started
from benchmarks.files import Files
from benchmarks.frame import Row, parser, ratios, report

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from benchmarks.answering import Answers, Engine

__all__ = ["COUNTS", "measure"]

REPEATS, STARTS = 6, 2
SHAPE = "7b-8k"

DType = Literal["float32", "bfloat16"]
Times = dict[str, list[float]]
"""Seconds of each round, by what was measured."""

ALPHAS = (1.0, -1.5, 0.5, 2.0, -0.75)
"""Of the fused engines; none is 0."""
COUNTS = {2: 0.9, 3: 1.3, 5: 2.1}
"""How many fused engines, and the goal. The limit is half of the number."""
INT8_LIMITS = {"float32": 1.25, "bfloat16": 1.5}
"""theta and one byte a weight, over theta."""

PROMPT_TOKENS, NEW_TOKENS = 2, 16
"""While decoding: the first step is short, too."""
LONG_PROMPTS, LONG_PROMPT_TOKENS = 4, 64
"""One step's tokens, so many that arithmetic is what takes time."""
SPARE_BYTES = 1 << 30
ROUNDING_SHARE = 0.05
"""What sums in another order may do to a logarithmic probability, as a share of what v does."""

PLAIN, FUSED, DIAL, INT8 = "plain", "fused", "dial", "dial, int8"
DIFFERENT = "a dial answered differently: the engines don't hold one model"
AT_ZERO, LONG, LONG_HALF = "at alpha 0", "long", "long, half"
console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Kinds:
    """How each kind of engine is started, and of what."""

    files: Files
    setup: Setup

    def keys(self, kind: str, alpha: float = ALPHAS[0]) -> dict[str, object]:
        """Return the loader's keys."""
        vector: dict[str, object] = {"vector": str(self.files.vector("dense"))}
        dial: dict[str, object] = {
            **vector,
            "mode": "dial",
            "alpha_range": [min(ALPHAS), max(ALPHAS)],
        }
        return {
            PLAIN: {},
            FUSED: {**vector, "alpha": alpha},
            DIAL: dial,
            INT8: {**dial, "vector_dtype": "int8"},
        }[kind]

    def start(self, stack: ExitStack, kind: str) -> Engine:
        """Start an engine that has all cores when it answers."""
        console.print(f"starting: {kind}")
        return stack.enter_context(started(self.files.target, self.keys(kind), self.setup))

    def start_shared(self, stack: ExitStack, alpha: float) -> Engine:
        """Start a fused engine that answers together with others."""
        console.print(f"starting: fused at alpha {alpha:g}, one of several")
        keys = self.keys(FUSED, alpha)
        threads = max(1, len(os.sched_getaffinity(0)) // 2)
        return stack.enter_context(started(self.files.target, keys, self.setup, threads=threads))


@dataclass(frozen=True, slots=True)
class Starts:
    """What was seen of engines that were started one by one."""

    seconds: Times = field(default_factory=dict)
    private_bytes: dict[str, list[int]] = field(default_factory=dict)

    def see(self, kind: str, engine: Engine) -> None:
        """Take down what an engine says of its start."""
        self.seconds.setdefault(kind, []).append(engine.load_seconds)
        self.private_bytes.setdefault(kind, []).append(engine.private_bytes)


def measure(
    files: Files, repeats: int | None = None, dtype: DType = "float32", requests: int = 1
) -> Iterator[Row]:
    """Compare memory and starts, then tokens a second.

    Args:
        files: Of the shape that is measured.
        repeats: Rounds.
        dtype: Of all engines.
        requests: Of each variant, at a time.
    """
    batched = max(LONG_PROMPTS * LONG_PROMPT_TOKENS, requests * len(ALPHAS) * PROMPT_TOKENS)
    setup = Setup(dtype, LONG_PROMPT_TOKENS + NEW_TOKENS, batched)
    kinds = Kinds(files, setup)
    starts = _start_each(kinds, min(repeats or STARTS, STARTS))
    yield from _memory_rows(starts, _floors(setup), dtype)
    yield Row(
        "start-up, dial / fused engine",
        **ratios(starts.seconds[DIAL], starts.seconds[FUSED]),
        goal=1.3,
        limit="1",
        note=_seconds_note(starts.seconds[DIAL], starts.seconds[FUSED]),
    )
    counts = _that_fit(starts)
    with ExitStack() as stack:
        engines = {kind: kinds.start(stack, kind) for kind in (PLAIN, FUSED, DIAL)}
        several = [kinds.start_shared(stack, a) for a in ALPHAS[: max(counts, default=0)]]
        rounds = Rounds(engines, several, counts, requests, is_exact=dtype == "float32")
        rounds.compare()
        for number in range(1 + (repeats or REPEATS)):
            console.print(f"round {number}" if number else "warming up")
            rounds.go()
    yield from _speed_rows(rounds)


def _start_each(kinds: Kinds, repeats: int) -> Starts:
    """Start each kind alone, several times, in turn."""
    seen = Starts()
    for _ in range(repeats):
        for kind in (PLAIN, FUSED, DIAL, INT8):
            with ExitStack() as stack:
                seen.see(kind, kinds.start(stack, kind))
    return seen


def _floors(setup: Setup) -> dict[str, int]:
    """Return what engines of a model of no size hold: imports, and caches."""
    with Files.made(None, layers=1, shape="tiny") as tiny:
        seen, kinds = Starts(), Kinds(tiny, setup)
        for kind in (PLAIN, DIAL, INT8):
            with ExitStack() as stack:
                seen.see(kind, kinds.start(stack, kind))
    return {kind: held[0] for kind, held in seen.private_bytes.items()}


def _that_fit(starts: Starts) -> list[int]:
    """Return the numbers of fused engines that fit into memory beside the others."""
    held = {kind: max(found) for kind, found in starts.private_bytes.items()}
    free = psutil.virtual_memory().available - SPARE_BYTES
    free -= held[PLAIN] + held[FUSED] + held[DIAL]
    fit = [count for count in COUNTS if count * held[FUSED] <= free]
    for count in COUNTS.keys() - fit:
        console.print(
            f"not measured: {count} engines of {held[FUSED] / 1e9:.1f} GB each "
            "don't fit into memory beside the others"
        )
    return fit


class Rounds:
    """Rounds in which engines that are compared answer in turn.

    Args:
        engines: That have all cores when they answer: plain, fused, dial.
        several: Fused engines that answer together; at `ALPHAS`.
        counts: How many of them do.
        requests: Of each variant, at a time.
        is_exact: Whether a dial's tokens have to be a fused engine's.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        several: Sequence[Engine],
        counts: Sequence[int],
        requests: int,
        *,
        is_exact: bool,
    ) -> None:
        self._engines, self._several, self.counts = engines, several, counts
        self._is_exact = is_exact
        self._short = Batch(_prompts(requests, PROMPT_TOKENS), NEW_TOKENS)
        self._long = Batch(_prompts(LONG_PROMPTS, LONG_PROMPT_TOKENS), 1)
        self.all: list[dict[str, float]] = []
        """Seconds by what was measured; the first round warms up."""
        self.tokens = requests * NEW_TOKENS
        """That one variant gives while decoding."""

    def compare(self) -> None:
        """See that a dial is a fused engine at its alpha, by numbers: tokens alone may not show it.

        Raises:
            RuntimeError: It is another model, or v is too small for it to show.
        """
        batch = Batch(self._short.prompts, NEW_TOKENS, has_logprobs=True)
        fused, dial = (self._ask(kind, batch.at(ALPHAS[:1])) for kind in (FUSED, DIAL))
        self._check(dial.tokens, fused.tokens)
        base = self._ask(DIAL, batch.at([0.0]))
        lost, done = (_distance(own.logprobs, fused.logprobs) for own in (dial, base))
        if self._is_exact and lost > ROUNDING_SHARE * done:
            raise RuntimeError(DIFFERENT)
        if self._is_exact and done == 0:
            raise RuntimeError("alpha changes nothing: the answers can't be compared")

    def go(self) -> None:
        """Measure everything once more."""
        seconds: dict[str, float] = {}
        plain = self._ask(PLAIN, self._short.at([0.0]))
        at_zero = self._ask(DIAL, self._short.at([0.0]))
        self._check(at_zero.tokens, plain.tokens)
        seconds |= {PLAIN: plain.seconds, AT_ZERO: at_zero.seconds}
        seconds[FUSED] = self._ask(FUSED, self._short.at(ALPHAS[:1])).seconds
        seconds[DIAL] = self._ask(DIAL, self._short.at(ALPHAS[:1])).seconds
        for count in self.counts:
            seconds |= self._decode(count, plain.tokens)
        self.all.append(seconds | self._prefill())

    def of(self, name: str) -> list[float]:
        """Return the seconds of each round that counts."""
        return [seconds[name] for seconds in self.all[1:]]

    def _decode(self, count: int, plain: list[list[int]]) -> dict[str, float]:
        alphas, with_base = ALPHAS[:count], (0.0, *ALPHAS[: count - 1])
        parts = [(e, self._short.at([a])) for e, a in zip(self._several, alphas, strict=False)]
        fused = answer_at_once(parts)
        dial = self._ask(DIAL, self._short.at(alphas))
        self._check(dial.tokens, fused.tokens)
        mixed = self._ask(DIAL, self._short.at(with_base))
        self._check(mixed.tokens, plain + fused.tokens[: len(plain) * (count - 1)])
        return {
            _name(FUSED, count): fused.seconds,
            _name(DIAL, count): dial.seconds,
            _name(AT_ZERO, count): mixed.seconds,
        }

    def _prefill(self) -> dict[str, float]:
        each = len(self._long.prompts)
        half = Batch(self._long.prompts, 1, [(0.0, ALPHAS[0])[n % 2] for n in range(each)])
        fused = self._ask(FUSED, self._long.at(ALPHAS[:1]))
        dial = self._ask(DIAL, self._long.at(ALPHAS[:1]))
        self._check(dial.tokens, fused.tokens)
        halved = self._ask(DIAL, half)
        self._check(halved.tokens[1::2], fused.tokens[1::2])
        return {
            _name(FUSED, LONG): fused.seconds,
            LONG: dial.seconds,
            LONG_HALF: halved.seconds,
        }

    def _ask(self, kind: str, batch: Batch) -> Answers:
        return answer_at_once([(self._engines[kind], batch)])

    def _check(self, own: list[list[int]], other: list[list[int]]) -> None:
        if self._is_exact and own != other:
            raise RuntimeError(DIFFERENT)


def _distance(own: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(own, other, strict=True))


def _prompts(count: int, tokens: int) -> list[list[int]]:
    return [[(7 * place + 11 * number) % 251 for place in range(tokens)] for number in range(count)]


def _name(kind: str, of: int | str) -> str:
    return f"{kind} {of}"


def _memory_rows(starts: Starts, floors: Mapping[str, int], dtype: DType) -> Iterator[Row]:
    """Compare what engines hold beyond those of a model of no size."""
    weights = {
        kind: [held - floors[kind] for held in starts.private_bytes[kind]]
        for kind in (PLAIN, DIAL, INT8)
    }
    for kind, limit in ((DIAL, 2.0), (INT8, INT8_LIMITS[dtype])):
        pairs = zip(weights[kind], weights[PLAIN], strict=True)
        own, plain = (statistics.median(weights[k]) for k in (kind, PLAIN))
        yield Row(
            f"weights in memory, {kind}, any N / plain engine",
            tuple(a / b for a, b in pairs),
            goal=limit,
            limit=f"{limit:g}",
            note=f"{own / 1e6:.1f} / {plain / 1e6:.1f} MB",
            figures={"weights_bytes": own, "plain_weights_bytes": plain},
        )


def _speed_rows(rounds: Rounds) -> Iterator[Row]:
    each = rounds.tokens
    zero = (rounds.of(AT_ZERO), rounds.of(PLAIN))
    yield _speed_row("decode at alpha 0, dial / plain engine", zero, each, 0.97, "1")
    one = (rounds.of(DIAL), rounds.of(FUSED))
    yield _speed_row("decode, dial at 1 alpha / fused engine", one, each, None, "0.5")
    for count in rounds.counts:
        dial, fused = rounds.of(_name(DIAL, count)), rounds.of(_name(FUSED, count))
        in_turn = [count * seconds for seconds in rounds.of(FUSED)]
        mixed, tokens, limit = rounds.of(_name(AT_ZERO, count)), each * count, f"{count / 2:g}"
        name = f"decode, dial at {count} alphas / {count} fused engines"
        yield _speed_row(f"{name} at once", (dial, fused), tokens, COUNTS[count], limit)
        yield _speed_row(f"{name} in turn", (dial, in_turn), tokens, None, limit)
        name = f"decode, dial at 0 and {count - 1} alphas / {count} fused engines at once"
        yield _speed_row(name, (mixed, fused), tokens, None, limit)
    tokens = LONG_PROMPTS * LONG_PROMPT_TOKENS
    fused = rounds.of(_name(FUSED, LONG))
    name = "prefill, dial at alpha 1 / fused engine"
    yield _speed_row(name, (rounds.of(LONG), fused), tokens, 0.45, "0.5")
    name = "prefill, dial, half of the requests at alpha 0 / fused engine"
    yield _speed_row(name, (rounds.of(LONG_HALF), fused), tokens, 0.6, "0.67")


def _speed_row(
    name: str, seconds: tuple[list[float], list[float]], tokens: int, goal: float | None, limit: str
) -> Row:
    """Turn seconds for the same tokens round: tokens a second."""
    dial, other = seconds
    speeds = [tokens / statistics.median(side) for side in seconds]
    return Row(
        f"tokens/s: {name}",
        **ratios(other, dial),
        goal=goal,
        limit=limit,
        at_least=True,
        note="{:.1f} / {:.1f} tokens/s".format(*speeds),
        figures={
            "dial_tokens_per_second": speeds[0],
            "other_tokens_per_second": speeds[1],
        },
    )


def _seconds_note(own: Sequence[float], other: Sequence[float]) -> str:
    return f"{statistics.median(own):.1f} / {statistics.median(other):.1f} s"


def main() -> None:
    """Make the files, measure, print one table."""
    options_parser = parser(__doc__)
    options_parser.set_defaults(shape=SHAPE)
    options_parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options_parser.add_argument(
        "--requests", type=int, default=1, help="of each variant at a time, while decoding"
    )
    options = options_parser.parse_args()
    with Files.asked_for(options) as files:
        title = f"{files.title}, run in {options.dtype}"  # while there are files to measure
        rows = list(measure(files, options.repeats, options.dtype, options.requests))
    sys.exit(report(rows, as_json=options.json, title=title))


if __name__ == "__main__":
    main()
