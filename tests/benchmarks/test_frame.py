"""Verdicts: what fails `make bench`, and what a busy machine may not make fail."""

from __future__ import annotations

import json

import pytest

from benchmarks.frame import Row, Verdict, ratios, report


@pytest.mark.parametrize(
    ("rounds", "fastest", "verdict"),
    [
        ((1.4, 1.5, 1.6), 1.4, Verdict.MET),
        ((1.5, 1.5, 9.0), 1.5, Verdict.MET),
        ((1.6, 1.7, 1.7), 1.6, Verdict.MISS),
        ((1.7, 1.9, 2.5), 1.7, Verdict.MISS),
        ((0.2, 1.8, 2.5), 1.8, Verdict.REGRESSION),
        ((1.6, 1.6, 1.6), 1.8, Verdict.MISS),
    ],
    ids=[
        "at the goal",
        "one bad round",
        "within 15 %",
        "a busy machine: the fastest are good",
        "too slow: a round that was slow for plain hides nothing",
        "one lucky load of plain",
    ],
)
def test_only_a_median_and_fastest_rounds_beyond_15_percent_are_a_regression(
    rounds: tuple[float, ...], fastest: float, verdict: Verdict
) -> None:
    """The goal is 1.5; 15 % beyond is 1.725."""
    assert Row("load", rounds, 1.5, fastest).verdict is verdict


@pytest.mark.parametrize(
    ("rounds", "verdict"),
    [
        ((19.0, 20.0, 30.0), Verdict.MET),
        ((15.0, 16.0, 17.5), Verdict.MISS),
        ((15.0, 16.0, 17.3), Verdict.REGRESSION),
        ((0.0, 0.0), Verdict.REGRESSION),
    ],
)
def test_more_may_be_better(rounds: tuple[float, ...], verdict: Verdict) -> None:
    """The goal is at least 20; 15 % below is 17.39; of what is not time the best counts."""
    row = Row("times faster", rounds, 20.0, at_least=True)
    assert row.verdict is verdict
    assert row.best == max(rounds)


def test_a_row_without_goal_has_no_verdict() -> None:
    """It informs."""
    assert Row("alpha 0", (99.0,)).verdict is Verdict.INFORMATION


def test_rounds_are_divided_one_by_one() -> None:
    """A busy round counts once, for both; the fastest need not be neighbours."""
    assert ratios([2.0, 30.0], [1.0, 10.0])["rounds"] == (2.0, 3.0)
    assert ratios([3.0, 8.0], [5.0, 2.0])["fastest"] == 1.5
    with pytest.raises(ValueError, match="argument"):
        ratios([1.0], [1.0, 2.0])


@pytest.mark.parametrize("as_json", [True, False])
def test_a_regression_ends_with_status_1(
    capsys: pytest.CaptureFixture[str], *, as_json: bool
) -> None:
    """In a table and in JSON, whatever the other rows say."""
    good, bad = Row("good", (1.0,), 1.5), Row("bad", (3.0,), 1.5)
    assert report([good], as_json=as_json, title="t") == 0
    assert report([good, bad], as_json=as_json, title="t") == 1
    assert "regression" in capsys.readouterr().out


def test_json_has_every_round(capsys: pytest.CaptureFixture[str]) -> None:
    """With machine, median, spread and verdict."""
    report([Row("load", (1.0, 4.0, 2.0), 1.5)], as_json=True, title="t")
    printed = json.loads(capsys.readouterr().out)
    (row,) = printed["rows"]
    assert row["rounds"] == [1.0, 4.0, 2.0]
    assert (row["median"], row["best"], row["quartiles"]) == (2.0, 1.0, [1.5, 3.0])
    assert row["verdict"] == "miss"
    assert "cores" in printed["machine"]
