"""benchmarks.dial: a dial and fused engines answer alike, and what differs is found."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import pytest

from benchmarks import dial
from benchmarks.answering import Batch, Setup
from benchmarks.dial import DIAL, FUSED, INT8, PLAIN, Kinds, Rounds, Starts
from benchmarks.files import Files

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.answering import Engine

MB = 10**6
SETUP = Setup("float32", 128, 256)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    folder = tmp_path_factory.mktemp("bench")
    with Files.made(str(folder), layers=1, shape="tiny") as made:
        yield made


class StuckAtZero:
    """A dial that answers at alpha 0, whatever is asked."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.receive = engine.receive

    def send(self, batch: Batch) -> None:
        """Let it begin, with other alphas."""
        self._engine.send(replace(batch, alphas=[0.0] * len(batch.alphas)))


def test_a_batch_has_each_request_at_each_alpha() -> None:
    """All requests of one variant beside each other: as the fused engines' answers come."""
    batch = Batch([[1], [2]], 3).at([0.5, -1.0])
    assert batch == Batch([[1], [2], [1], [2]], 3, [0.5, 0.5, -1.0, -1.0])


def test_memory_is_counted_beyond_a_model_of_no_size() -> None:
    """100 MB of weights, 150 with v in int8, 200 with v; imports do not count."""
    held = {PLAIN: [600 * MB], DIAL: [720 * MB], INT8: [670 * MB]}
    floors = {PLAIN: 500 * MB, DIAL: 520 * MB, INT8: 520 * MB}
    rows = list(dial._memory_rows(Starts({}, held), floors, "bfloat16"))
    assert [row.rounds for row in rows] == [(2.0,), (1.5,)]
    assert [row.goal for row in rows] == [2.0, 1.5]
    float32 = list(dial._memory_rows(Starts({}, held), floors, "float32"))
    assert float32[1].goal == 1.25


def test_engines_that_do_not_fit_are_left_out_and_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No machine has memory for several of an exabyte."""
    small, large = ({kind: [size] for kind in (PLAIN, FUSED, DIAL)} for size in (0, 10**18))
    assert dial._that_fit(Starts({}, small)) == list(dial.COUNTS)
    assert not capsys.readouterr().err
    assert dial._that_fit(Starts({}, large)) == []
    assert "not measured: 5 engines" in capsys.readouterr().err


def test_speed_is_seconds_turned_round() -> None:
    """Twice as fast for the same tokens is 2."""
    row = dial._speed_row("decode", ([1.0, 2.0], [2.0, 4.0]), 32, 1.5, "2")
    assert row.rounds == (2.0, 2.0)
    assert row.figures["other_tokens_per_second"] == pytest.approx(32 / 3)


@pytest.mark.engine
def test_a_dial_answers_as_fused_engines_do_and_anything_else_is_found(files: Files) -> None:
    """Every row of the decode and prefill loads; a dial in a fused engine's place is not one."""
    kinds = Kinds(files, SETUP)
    with ExitStack() as stack:
        both = {FUSED: kinds.start(stack, FUSED), DIAL: kinds.start(stack, DIAL)}
        both[PLAIN] = both[DIAL]  # at alpha 0: two engines are enough for the claim
        rounds = Rounds(both, [], [], 1, is_exact=True)
        rounds.compare()
        rounds.go()
        rounds.go()
        deaf = Rounds(both | {DIAL: both[FUSED]}, [], [], 1, is_exact=True)
        with pytest.raises(RuntimeError, match="alpha changes nothing"):
            deaf.compare()
        wrong = Rounds(
            both | {FUSED: cast("Engine", StuckAtZero(both[DIAL]))}, [], [], 1, is_exact=True
        )
        with pytest.raises(RuntimeError, match="answered differently"):
            wrong.compare()
    rows = list(dial._speed_rows(rounds))
    assert [row.limit for row in rows] == ["1", "0.5", "0.5", "0.67"]
    assert all(len(row.rounds) == 1 and row.best > 0 for row in rows)
