"""How much at once: rates, places in flight, and that all that is taken comes back."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_rvec.router.keyring import ClientKey, KeyConfig, hash_key
from vllm_rvec.router.limits import InFlightLimit, Limiter, RateLimitedError, VariantBusyError

TEAM = ClientKey("team-a")
OTHER = ClientKey("team-b")


class Clock:
    """Stands still until told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """The time by this clock."""
        return self.now


def limits(rate: float | None = None, most: int | None = None) -> KeyConfig:
    return KeyConfig(sha256=hash_key("k"), requests_per_minute=rate, max_in_flight=most)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limiter(clock: Clock) -> Limiter:
    return Limiter(clock)


def ask(limiter: Limiter, config: KeyConfig | None, client: ClientKey | None = TEAM) -> bool:
    """Whether a request that ends at once is let in."""
    try:
        with limiter.admit(client, config):
            return True
    except RateLimitedError:
        return False


def let_in(limiter: Limiter, config: KeyConfig, tries: int = 1000) -> int:
    """How many of many requests at once are let in."""
    return sum(ask(limiter, config) for _ in range(tries))


def test_a_burst_is_five_seconds_worth(limiter: Limiter, clock: Clock) -> None:
    """600 a minute: 50 at once, then 10 a second, and never more after a long rest."""
    config = limits(600)
    assert let_in(limiter, config) == 50
    clock.now += 1
    assert let_in(limiter, config) == 10
    clock.now += 3600
    assert let_in(limiter, config) == 50


def test_a_slow_rate_lets_one_in_at_a_time(limiter: Limiter, clock: Clock) -> None:
    """Two a minute: less than one in five seconds, but one can always come."""
    config = limits(2)
    assert let_in(limiter, config) == 1
    clock.now += 29
    assert let_in(limiter, config) == 0
    clock.now += 1
    assert let_in(limiter, config) == 1


def test_the_refusal_says_which_limit_and_when_to_come_back(limiter: Limiter, clock: Clock) -> None:
    """As text and as facts."""
    config = limits(2)
    assert ask(limiter, config)
    clock.now += 0.5
    with pytest.raises(RateLimitedError) as caught, limiter.admit(TEAM, config):
        pass
    error = caught.value
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert error.retry_after_seconds == 30
    assert "'team-a' may send 2 requests per minute" in str(error)
    assert "Try again in 30 s." in str(error)


@given(
    rate=st.floats(0.01, 100_000),
    steps=st.lists(st.floats(0, 100), max_size=20),
    origin=st.floats(0, 1e6),
)
def test_who_waits_as_told_is_let_in(rate: float, steps: list[float], origin: float) -> None:
    """For any rate and history, floats notwithstanding."""
    clock = Clock()
    clock.now = origin
    limiter = Limiter(clock)
    config = limits(rate)
    for step in steps:
        clock.now += step
        ask(limiter, config)
    while True:
        try:
            with limiter.admit(TEAM, config):
                continue
        except RateLimitedError as error:
            clock.now += error.retry_after_seconds
            break
    assert ask(limiter, config)


@given(rate=st.floats(1, 6000), steps=st.lists(st.floats(0, 3), min_size=1, max_size=100))
def test_no_pattern_beats_the_rate(rate: float, steps: list[float]) -> None:
    """Over any time: the burst and what the rate gives, no more."""
    clock = Clock()
    limiter = Limiter(clock)
    config = limits(rate)
    begun = clock.now
    got = 0
    for step in steps:
        clock.now += step
        got += let_in(limiter, config, tries=10)
    burst = max(1.0, rate / 60 * 5)
    assert got <= burst + (clock.now - begun) * rate / 60 + 1e-6


@pytest.mark.parametrize("jump", [-1e9, -1.0])
def test_a_clock_that_goes_back_gives_and_takes_nothing(
    limiter: Limiter, clock: Clock, jump: float
) -> None:
    """Nobody gets more, and nobody waits until the clock has caught up."""
    config = limits(600)
    assert let_in(limiter, config) == 50
    clock.now += jump
    assert let_in(limiter, config) == 0
    clock.now += 1
    assert let_in(limiter, config) == 10


@pytest.mark.parametrize("rate", [5e-324, 1e-9, 1.7e308])
def test_the_strangest_rates_do_no_harm(limiter: Limiter, rate: float) -> None:
    """They are allowed in the file; a request is let in or refused, nothing else."""
    assert ask(limiter, limits(rate))
    for _ in range(3):
        try:
            with limiter.admit(TEAM, limits(rate)):
                pass
        except RateLimitedError as error:
            assert error.retry_after_seconds == 86_400  # noqa: PT017 - either way is right


def test_clients_do_not_use_up_each_others_limits(limiter: Limiter) -> None:
    """Each name has its own."""
    assert let_in(limiter, limits(60)) == 5
    assert ask(limiter, limits(60), OTHER)


@pytest.mark.parametrize("client", [None, ClientKey(None)])
def test_nobodys_and_the_shared_key_have_no_limits(
    limiter: Limiter, client: ClientKey | None
) -> None:
    """Nor has a client that nothing is configured for."""
    assert all(ask(limiter, limits(1, 1), client) for _ in range(10))
    assert all(ask(limiter, None) for _ in range(10))
    assert let_in(limiter, limits(), 10) == 10


def test_only_so_many_are_in_flight(limiter: Limiter) -> None:
    """The next is refused with 429 and let in when one has ended."""
    config = limits(most=2)
    with limiter.admit(TEAM, config):
        with limiter.admit(TEAM, config):
            with pytest.raises(RateLimitedError, match="2 requests in flight") as caught:
                limiter.admit(TEAM, config).__enter__()
            assert caught.value.retry_after_seconds == 1
            assert limiter.in_flight("team-a") == 2
            assert ask(limiter, config, OTHER)
        assert ask(limiter, config)
    assert limiter.in_flight("team-a") == 0


def test_a_refused_request_uses_nothing_up(limiter: Limiter, clock: Clock) -> None:
    """Neither a token where a place was missing, nor a place where a token was."""
    config = limits(12, 1)
    with limiter.admit(TEAM, config):
        assert not ask(limiter, config)
    clock.now += 5
    assert ask(limiter, config)
    assert not ask(limiter, config)
    assert limiter.in_flight("team-a") == 0


def test_the_state_outlives_a_reload(limiter: Limiter, clock: Clock) -> None:
    """A new configuration holds from the next request on and gives no new burst."""
    with limiter.admit(TEAM, limits(60, 2)):
        assert let_in(limiter, limits(60, 2)) == 4
        assert not ask(limiter, limits(120, 2))
        clock.now += 1
        assert let_in(limiter, limits(120, 2)) == 2
        clock.now += 60
        assert not ask(limiter, limits(120, 1))
        assert ask(limiter, limits(120, 2))


def test_a_limit_that_comes_and_goes_begins_full(limiter: Limiter) -> None:
    """What was asked while there was none does not count."""
    assert let_in(limiter, limits(60)) == 5
    assert let_in(limiter, limits()) == 1000
    assert let_in(limiter, limits(60)) == 5


@pytest.mark.anyio
@pytest.mark.parametrize("ending", ["error", "cancelled", "never started"])
async def test_places_come_back_however_a_request_ends(limiter: Limiter, ending: str) -> None:
    """Of a key and of a variant, both."""
    variant = InFlightLimit("base", 1)
    inside = asyncio.Event()

    async def answer() -> None:
        with limiter.admit(TEAM, limits(most=1)), ExitStack() as held:
            held.callback(variant.take())
            inside.set()
            if ending == "error":
                raise ConnectionResetError
            await asyncio.Event().wait()

    task = asyncio.create_task(answer())
    if ending != "never started":
        await inside.wait()
    if ending != "error":
        task.cancel()
    with pytest.raises((ConnectionResetError, asyncio.CancelledError)):
        await task
    assert (limiter.in_flight("team-a"), variant.in_flight) == (0, 0)
    assert ask(limiter, limits(most=1))


def test_a_busy_variant_says_so() -> None:
    """503, with which variant, how many, and when to ask again."""
    limit = InFlightLimit("enhanced@1", 1)
    give_back = limit.take()
    with pytest.raises(VariantBusyError) as caught:
        limit.take()
    assert limit.in_flight == 1
    give_back()
    error = caught.value
    assert (error.status, error.code, error.retry_after_seconds) == (503, "model_busy", 1)
    assert (error.variant, error.max_in_flight) == ("enhanced@1", 1)
    assert "'enhanced@1' is busy" in str(error)
    limit.take()


def test_a_variants_limit_may_change_while_it_answers() -> None:
    """Those inside stay and go on counting; without a limit all are let in, and counted."""
    limit = InFlightLimit("base", None)
    with ExitStack() as inside:
        for _ in range(3):
            inside.callback(limit.take())
        limit.max_in_flight = 2
        with pytest.raises(VariantBusyError):
            limit.take()
        limit.max_in_flight = 4
        inside.callback(limit.take())
        assert limit.in_flight == 4
    assert limit.in_flight == 0
