"""The half that a problem is in: by its name alone, and as often one as the other."""

from __future__ import annotations

import doctest
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from scipy.special import bdtr

from vllm_rvec.evaluation import halves
from vllm_rvec.evaluation.halves import half_of, hash_of

UNLIKELY = 1e-9
"""A right program fails a check about once in a billion times."""


def test_documented_examples_hold() -> None:
    """The docstring's doctest passes: halves stay what they are from one release to the next."""
    assert doctest.testmod(halves).failed == 0


@given(st.text(), st.text(), st.integers(0, 2**63 - 1))
def test_a_problem_stays_in_its_half(task: str, problem: str, seed: int) -> None:
    """The half depends on task, problem and seed alone."""
    assert half_of(task, problem, seed) == half_of(task, problem, seed)


def test_halves_are_equal_in_expectation() -> None:
    """Of 10,000 problems, as many choose as a fair coin would give."""
    for seed in range(5):
        counts = Counter(half_of("task", str(number), seed) for number in range(10_000))
        assert set(counts) == {"choose", "confirm"}
        assert bdtr(min(counts.values()), 10_000, 0.5) > UNLIKELY


def test_tasks_and_seeds_deal_independently() -> None:
    """Another task's name, or another seed, moves half of the problems."""
    ids = [str(number) for number in range(4_000)]
    for other in (("other", 0), ("task", 1)):
        moved = sum(half_of("task", i, 0) != half_of(other[0], i, other[1]) for i in ids)
        assert 1_700 < moved < 2_300


def test_texts_are_hashed_with_their_borders() -> None:
    """Two lists of texts that read alike when joined have two hashes."""
    assert hash_of("a", "bc") != hash_of("ab", "c")
    assert hash_of("\ud800") != hash_of("?")
