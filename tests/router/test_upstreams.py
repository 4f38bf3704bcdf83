"""How busy and how well upstreams are, by a clock of the test's own."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from vllm_rvec.router import Upstream
from vllm_rvec.router.upstreams import TRIAL_SECONDS, Load

if TYPE_CHECKING:
    from collections.abc import Iterator

A, B = Upstream("http://a", None), Upstream("http://b", "key")


@contextmanager
def lease(load: Load, upstream: Upstream) -> Iterator[None]:
    load.begin(upstream)
    try:
        yield
    finally:
        load.end(upstream)


class Clock:
    """Seconds that go by when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """What time it is."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def load(clock: Clock) -> Load:
    return Load(clock)


def test_the_one_with_fewest_requests_is_next(load: Load) -> None:
    """Counted from the lease to its end; of equals the first."""
    assert load.least_busy([A, B]) == A
    with lease(load, A):
        assert load.least_busy([A, B]) == B
        with lease(load, B), lease(load, B):
            assert load.least_busy([A, B]) == A
            assert (load.in_flight(A), load.in_flight(B)) == (1, 2)
    assert (load.in_flight(A), load.in_flight(B)) == (0, 0)


def test_a_lease_ends_with_an_error_too(load: Load) -> None:
    """Or a failing upstream would look busy for ever."""
    with pytest.raises(OSError, match="gone"), lease(load, A):
        raise OSError("gone")
    assert load.in_flight(A) == 0


def test_one_that_failed_is_skipped_until_its_trial(load: Load, clock: Clock) -> None:
    """At once, and not for ever: nobody may be watching."""
    load.note_failure(A)
    assert not load.is_well(A)
    with lease(load, B):
        assert load.least_busy([A, B]) == B
    assert load.least_busy([A]) is None
    clock.now += TRIAL_SECONDS
    assert load.least_busy([A]) == A


def test_nobody_is_least_busy_among_none(load: Load) -> None:
    """A variant may have no upstream at the moment."""
    assert load.least_busy([]) is None


def test_so_many_failed_checks_in_a_row_are_too_many(load: Load, clock: Clock) -> None:
    """One that is well in between begins anew."""
    for is_well in (False, False, True, False, False):
        load.note_check(A, is_well=is_well, allowed=3, hold=7)
        assert load.is_well(A)
    load.note_check(A, is_well=False, allowed=3, hold=7)
    assert not load.is_well(A)
    clock.now += 6.9
    assert not load.is_well(A)


def test_a_failed_check_holds_one_that_a_request_found_down(load: Load, clock: Clock) -> None:
    """Its trial would cost a request, and the check has just said how it would end."""
    load.note_failure(A)
    load.note_check(A, is_well=False, allowed=3, hold=7)
    clock.now += TRIAL_SECONDS
    assert not load.is_well(A)


def test_a_good_check_takes_it_back_at_once(load: Load) -> None:
    """However long it was to be skipped."""
    load.note_failure(A, seconds=1000)
    load.note_check(A, is_well=True, allowed=1, hold=7)
    assert load.is_well(A)


def test_those_that_are_gone_are_forgotten_when_nothing_is_under_way(load: Load) -> None:
    """A request under way still gives its place back."""
    load.note_failure(A)
    with lease(load, B):
        load.keep_only([])
        assert load.is_well(A)
        assert load.in_flight(B) == 1
    assert load.in_flight(B) == 0
    load.keep_only([])
    assert load.in_flight(B) == 0


def test_conditions_belong_to_the_address(load: Load) -> None:
    """Another key does not make it another engine."""
    load.note_failure(A)
    assert not load.is_well(Upstream(A.base_url, "another"))
