"""vllm_rvec.router.results.report and verdict: the summary and its words."""

from __future__ import annotations

import json

import pytest

from vllm_rvec.errors import ConfigError
from vllm_rvec.router.results.report import ExperimentSummary, VariantCounts, summarise
from vllm_rvec.router.results.statistics import Clusters

SPLIT = {"base": 1.0, "enhanced@1": 1.0}


def votes(ups: int, n: int) -> Clusters:
    return Clusters.of([(1, 1.0)] * ups + [(1, 0.0)] * (n - ups))


def counts(variant: str, ups: int = 0, n: int = 0, units: int = 1000) -> VariantCounts:
    return VariantCounts(
        variant,
        exposures=units,
        units=units,
        split_units=units,
        errors=votes(units // 100, units),
        votes=votes(ups, n),
        ttft_seconds=[0.1, 0.3, 0.2],
        duration_seconds=[1.0, 2.0, 3.0],
        token_seconds=[0.01, 0.02, 0.03],
    )


def summary(*variants: VariantCounts, **weights: float) -> ExperimentSummary:
    return summarise("assistant", variants, weights or SPLIT, not_counted={"explicit": 3})


def test_a_clear_difference_is_called_better_or_worse() -> None:
    """With its size, interval and p value."""
    better = summary(counts("base", 500, 1000), counts("enhanced@1", 600, 1000))
    assert better.verdict == (
        "enhanced@1 is better than base: +10.0 points "
        "(95 % interval +5.6 to +14.3 points, p < 0.0001)"
    )
    worse = summary(counts("base", 560, 1000), counts("enhanced@1", 500, 1000))
    assert worse.verdict.startswith("enhanced@1 is worse than base: -6.0 points (95 % interval -")
    assert "p = 0.007" in worse.verdict


def test_an_unclear_difference_says_how_much_more_is_needed() -> None:
    """In rated requests, rounded."""
    found = summary(counts("base", 500, 1000), counts("enhanced@1", 520, 1000))
    assert found.verdict == (
        "can't tell yet: the interval of the difference (-2.4 to +6.4 points) includes 0; "
        "about 18,000 more rated requests, split as until now, would probably (4 of 5 times) show "
        "a difference as large as the one seen, if it is real"
    )


def test_a_split_that_is_not_as_configured_beats_every_other_word() -> None:
    """However clear the difference looks."""
    found = summary(counts("base", 50, 100), counts("enhanced@1", 99, 100, units=800))
    assert found.verdict.startswith("don't trust it: the traffic is not split as configured (p ")
    assert not found.is_split_as_configured
    assert found.sample_ratio_p is not None
    assert found.sample_ratio_p < 0.001


@pytest.mark.parametrize(
    ("variants", "words"),
    [
        ([], "nothing to compare"),
        ([counts("base", 5, 9)], "nothing to compare"),
        ([counts("base"), counts("enhanced@1")], "can't tell yet: no request has been rated"),
        ([counts("base", 3, 6), counts("enhanced@1")], "no rated request of enhanced@1"),
        ([counts("base", 0, 3), counts("enhanced@1", 3, 3)], "too few rated requests (3 and 3"),
        ([counts("base", 50, 50), counts("enhanced@1", 50, 50)], "too few rated requests"),
        ([counts("base", 50, 90), counts("enhanced@1", 50, 90)], "no difference is seen"),
    ],
)
def test_too_little_data_says_so(variants: list[VariantCounts], words: str) -> None:
    """Never a winner, never an exception."""
    assert words in summary(*variants).verdict


def test_scores_are_compared_by_their_means() -> None:
    """The measure is what more requests have."""
    low, high = ([(1, 0.1 * (n % 5) + more) for n in range(50)] for more in (0.0, 0.5))
    first = VariantCounts("base", scores=Clusters.of(low), votes=votes(1, 2))
    other = VariantCounts("enhanced@1", scores=Clusters.of(high))
    found = summary(first, other)
    assert found.measure == "scores"
    assert found.outcomes == 100
    assert found.verdict.startswith("enhanced@1 is better than base: +0.5 (95 % interval +0.4")


def test_three_variants_are_each_compared_with_the_first() -> None:
    """And the caution counts the comparisons."""
    found = summary(counts("a", 50, 100), counts("b", 80, 100), counts("c", 51, 100), a=1, b=1, c=1)
    better, unclear = found.verdict.split("; ", 1)
    assert better.startswith("b is better than a")
    assert unclear.startswith("c against a: can't tell yet")
    assert "p < 0.025" in found.caution


def test_looking_again_and_again_is_warned_of() -> None:
    """In every summary."""
    assert "Looking again and again" in summary(counts("base"), counts("enhanced@1")).caution


def test_shares_are_of_units_in_the_split_as_it_is() -> None:
    """A variant that was taken out has no share, and does not change the others'."""
    found = summary(counts("base", units=600), counts("enhanced@1", units=400), counts("gone"))
    base, enhanced, gone = found.variants
    assert (base.configured_share, base.realised_share) == (0.5, 0.6)
    assert (enhanced.configured_share, enhanced.realised_share) == (0.5, 0.4)
    assert (gone.configured_share, gone.realised_share) == (0, None)


def test_json_goes_there_and_back() -> None:
    """Strict JSON, from which the same summary is read; fields of later versions don't matter."""
    found = summary(counts("base", 5, 9), counts("enhanced@1"))
    data = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert data["variants"][0]["ttft_seconds"] == {"p50": 0.2, "p95": pytest.approx(0.29)}
    assert data["variants"][0]["token_seconds"] == {"p50": 0.02, "p95": pytest.approx(0.029)}
    assert ExperimentSummary.from_json(data | {"later": 1}) == found


def test_something_else_than_a_summary_is_refused() -> None:
    """With the place of what is wrong."""
    with pytest.raises(ConfigError, match="experiment: Field required"):
        ExperimentSummary.from_json({})
