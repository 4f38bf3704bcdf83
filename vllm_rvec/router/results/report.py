"""What an experiment shows, as numbers: each variant, and its difference to the first.

Takes sums and gives a summary; `reader` finds the sums, `verdict` says it in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence  # noqa: TC003 - pydantic reads the annotations
from dataclasses import asdict, dataclass, field
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from vllm_rvec.errors import ConfigError
from vllm_rvec.intervals import Estimate, quantile
from vllm_rvec.router.results import statistics
from vllm_rvec.router.results.statistics import Clusters, Difference
from vllm_rvec.router.results.verdict import caution_of, verdict_of

__all__ = ["ExperimentSummary", "Quantiles", "VariantCounts", "VariantSummary", "summarise"]

SUSPICIOUS_P = 0.001
"""The split is not as configured: a threshold that false alarms rarely reach, since the test is
looked at often (Fabijan et al., KDD 2019)."""


@dataclass(frozen=True, slots=True)
class VariantCounts:
    """What the files hold of one variant in one experiment.

    Args:
        variant: Its name.
        exposures: Requests that the split sent to it.
        units: Distinct sticky keys, and each request without a key.
        split_units: Those since the split was last changed.
        errors: Over exposures, 1 for an error.
        votes: Over requests with a vote, 1 for up.
        scores: Over requests with a score.
        ttft_seconds: Of the newest successful exposures.
        duration_seconds: Of the newest successful exposures.
        token_seconds: Of those that streamed and told their tokens, for each token but the first.
        prompt_tokens: In all.
        completion_tokens: In all.
    """

    variant: str
    exposures: int = 0
    units: int = 0
    split_units: int = 0
    errors: Clusters = field(default_factory=Clusters)
    votes: Clusters = field(default_factory=Clusters)
    scores: Clusters = field(default_factory=Clusters)
    ttft_seconds: Sequence[float] = ()
    duration_seconds: Sequence[float] = ()
    token_seconds: Sequence[float] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Quantiles:
    """The median and the 95th percentile, in seconds."""

    p50: float
    p95: float


@dataclass(frozen=True, slots=True)
class VariantSummary:
    """One variant of an experiment.

    Args:
        variant: Its name.
        exposures: Requests that the split sent to it.
        units: Distinct sticky keys, and each request without a key.
        configured_share: Of the split as it is now; None when it isn't known.
        realised_share: Of the units since the split was last changed.
        votes: Requests with a vote.
        win_rate: Share of votes that are up.
        scores: Requests with a score.
        mean_score: Of these.
        error_rate: Share of exposures that were errors.
        ttft_seconds: Time to the first token, of the newest successful exposures.
        duration_seconds: To the last byte, of the newest successful exposures.
        token_seconds: Time per output token: of the newest successful streams that told their
            tokens, from the first token to the end, for each token but the first.
        prompt_tokens: In all.
        completion_tokens: In all.
        difference: To the first variant, by the experiment's measure.
    """

    variant: str
    exposures: int
    units: int
    configured_share: float | None
    realised_share: float | None
    votes: int
    win_rate: Estimate | None
    scores: int
    mean_score: Estimate | None
    error_rate: Estimate | None
    ttft_seconds: Quantiles | None
    duration_seconds: Quantiles | None
    token_seconds: Quantiles | None
    prompt_tokens: int
    completion_tokens: int
    difference: Difference | None


@dataclass(frozen=True, slots=True)
class ExperimentSummary:
    """What an experiment shows so far.

    Args:
        experiment: The alias.
        variants: In the split's order; the first is the one that others are compared with.
        measure: What differences are of: whichever more requests have.
        outcomes: Rated requests, of that measure.
        sample_ratio_p: Of "the units are split as configured", since the split was last changed.
            None when there are too few units to tell.
        is_split_as_configured: False when that p value is under 0.001: the comparison is worthless
            until the cause is found.
        not_counted: Requests that the split did not assign, by reason.
        verdict: What the data say, in words.
        caution: What to keep in mind.
    """

    experiment: str
    variants: tuple[VariantSummary, ...]
    measure: Literal["votes", "scores"] | None
    outcomes: int
    sample_ratio_p: float | None
    is_split_as_configured: bool
    not_counted: Mapping[str, int]
    verdict: str
    caution: str

    def as_json(self) -> dict[str, object]:
        """The summary as JSON has it: no NaN, null for what can't be calculated."""
        return asdict(self) | {"variants": [asdict(one) for one in self.variants]}

    @classmethod
    def from_json(cls, data: object) -> ExperimentSummary:
        """Read what `as_json` wrote, perhaps in a newer version.

        Raises:
            ConfigError: It is something else.
        """
        try:
            return TypeAdapter(cls).validate_python(data)
        except ValidationError as exc:
            first = exc.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the whole"
            raise ConfigError(
                "That is not the summary of an experiment.", why=f"{place}: {first['msg']}"
            ) from exc


def summarise(
    experiment: str,
    counts: Sequence[VariantCounts],
    weights: Mapping[str, float],
    *,
    not_counted: Mapping[str, int],
    split_changes: int = 0,
) -> ExperimentSummary:
    """Calculate a summary.

    Args:
        experiment: The alias.
        counts: Of each variant; the first is compared with.
        weights: The split as it is now; empty when it isn't known.
        not_counted: Requests that the split did not assign, by reason.
        split_changes: How often the split was changed while these requests were made.
    """
    measure = _measure(counts)
    rated = [_rated(item, measure) for item in counts]
    differences = [None, *(_difference(rated[0], other, measure) for other in rated[1:])]
    p_value = statistics.sample_ratio_p(
        [item.split_units for item in counts], [weights.get(item.variant, 0.0) for item in counts]
    )
    variants = tuple(
        _variant(item, _shares(item, counts, weights), difference)
        for item, difference in zip(counts, differences, strict=False)
    )
    suspicious = p_value if p_value is not None and p_value < SUSPICIOUS_P else None
    names = [item.variant for item in counts]
    return ExperimentSummary(
        experiment=experiment,
        variants=variants,
        measure=measure,
        outcomes=int(sum(item.requests for item in rated)),
        sample_ratio_p=p_value,
        is_split_as_configured=suspicious is None,
        not_counted=dict(not_counted),
        verdict=verdict_of(names, rated, differences, measure, suspicious),
        caution=caution_of(len(counts), split_changes),
    )


def _measure(counts: Sequence[VariantCounts]) -> Literal["votes", "scores"] | None:
    votes = sum(item.votes.requests for item in counts)
    scores = sum(item.scores.requests for item in counts)
    if not votes and not scores:
        return None
    return "votes" if votes >= scores else "scores"


def _rated(counts: VariantCounts, measure: str | None) -> Clusters:
    return counts.scores if measure == "scores" else counts.votes


def _difference(first: Clusters, other: Clusters, measure: str | None) -> Difference | None:
    if measure == "scores":
        return statistics.mean_difference(first, other)
    return statistics.rate_difference(first, other)


def _shares(
    counts: VariantCounts, others: Sequence[VariantCounts], weights: Mapping[str, float]
) -> tuple[float | None, float | None]:
    """The configured and the realised share."""
    weight = sum(weights.values())
    units = sum(item.split_units for item in others if weights.get(item.variant, 0.0) > 0)
    own = weights.get(counts.variant, 0.0)
    configured = own / weight if weight > 0 else None
    return configured, counts.split_units / units if units and own > 0 else None


def _variant(
    counts: VariantCounts,
    shares: tuple[float | None, float | None],
    difference: Difference | None,
) -> VariantSummary:
    return VariantSummary(
        variant=counts.variant,
        exposures=counts.exposures,
        units=counts.units,
        configured_share=shares[0],
        realised_share=shares[1],
        votes=int(counts.votes.requests),
        win_rate=statistics.rate_of(counts.votes),
        scores=int(counts.scores.requests),
        mean_score=statistics.mean_of(counts.scores),
        error_rate=statistics.rate_of(counts.errors),
        ttft_seconds=_quantiles(counts.ttft_seconds),
        duration_seconds=_quantiles(counts.duration_seconds),
        token_seconds=_quantiles(counts.token_seconds),
        prompt_tokens=counts.prompt_tokens,
        completion_tokens=counts.completion_tokens,
        difference=difference,
    )


def _quantiles(values: Sequence[float]) -> Quantiles | None:
    ordered = sorted(values)
    p50, p95 = quantile(ordered, 0.5), quantile(ordered, 0.95)
    return None if p50 is None or p95 is None else Quantiles(p50, p95)
