"""vllm_rvec.router.results.store: a real SQLite file, locked, full, moved, rotated."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import stat
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from vllm_rvec.errors import ConfigError, RvecError
from vllm_rvec.router.results import (
    Exposure,
    Outcome,
    ResultsConfig,
    ResultsStore,
    ResultsUnavailableError,
    read_experiments,
)
from vllm_rvec.router.results import writer as writer_module
from vllm_rvec.router.results.schema import open_for_writing
from vllm_rvec.router.results.store import QUEUE_ROWS
from vllm_rvec.router.results.writer import RETRY_SECONDS
from vllm_rvec.router.results.writing import insert_exposures

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio

SPLIT = {"base": 1.0, "enhanced@1": 1.0}

FIRSTS = "SELECT substr(request_id, 1, 1) FROM exposures GROUP BY 1 ORDER BY min(id)"

EXPOSURE = Exposure(
    request_id="r",
    at=1_700_000_000.0,
    experiment="assistant",
    variant="base",
    reason="sticky",
    unit="u",
    status=200,
    is_error=False,
    ttft_seconds=0.1,
    duration_seconds=1.0,
    prompt_tokens=3,
    completion_tokens=5,
)

Open = Callable[..., ResultsStore]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.sqlite"


@pytest.fixture
async def open_store(path: Path) -> AsyncIterator[Open]:
    """Starts a store on `path`, and closes it at the end."""
    async with AsyncExitStack() as stack:

        def start(**config: Any) -> ResultsStore:
            store = ResultsStore(ResultsConfig(path=str(path), **config))
            store.start()
            stack.callback(store.close)
            return store

        yield start


def query(path: Path, sql: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchall()


def beside(path: Path) -> list[Path]:
    """All files of the folder."""
    return list(path.parent.iterdir())


def lock(path: Path) -> sqlite3.Connection:
    """Another process that has the file to itself."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    return connection


async def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def written(store: ResultsStore) -> None:
    """Wait until the file can be written again, and all is in it."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return await store.flush()
        except ResultsUnavailableError:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


def many(n: int, **changes: Any) -> list[Exposure]:
    return [replace(EXPOSURE, request_id=f"r{i}", unit=f"u{i}", **changes) for i in range(n)]


async def test_what_was_served_and_rated_is_summed_up(open_store: Open) -> None:
    """Exposures, units, votes, errors, tokens and latencies, by variant."""
    store = open_store()
    store.note_split("assistant", SPLIT)
    for i in range(40):
        variant = ("base", "enhanced@1")[i % 2]
        exposure = replace(EXPOSURE, request_id=f"r{i}", unit=f"u{i % 20}", variant=variant)
        store.record(replace(exposure, is_error=i == 1))
    assert await store.add(Outcome("r0", 1.0, vote="up"))
    assert await store.add(Outcome("r2", 1.0, vote="down", comment="no"))
    assert not await store.add(Outcome("unknown", 1.0, vote="up"))
    (found,) = await store.experiments({"assistant": SPLIT})
    base, enhanced = found.variants
    assert (base.exposures, base.units, base.votes) == (20, 10, 2)
    assert base.win_rate is not None
    assert base.win_rate.value == 0.5
    assert enhanced.error_rate is not None
    assert enhanced.error_rate.value == 0.05
    assert (enhanced.prompt_tokens, enhanced.completion_tokens) == (60, 100)
    assert base.duration_seconds is not None
    assert base.duration_seconds.p95 == 1.0
    assert base.token_seconds is not None
    assert base.token_seconds.p50 == pytest.approx(0.9 / 4)
    assert found.sample_ratio_p == 1.0


async def test_only_what_the_split_assigned_counts(open_store: Open) -> None:
    """The other reasons are counted apart; requests by a variant's own name are no experiment."""
    store = open_store()
    for reason in ("sticky", "random", "explicit", "alias", "alpha", "fallback", "fallback"):
        unit = "" if reason == "random" else "u"
        store.record(replace(EXPOSURE, reason=reason, unit=unit))
    store.record(replace(EXPOSURE, experiment="", reason="explicit"))
    store.record(replace(EXPOSURE, experiment="name", reason="alias"))
    (found,) = await store.experiments({})
    assert found.not_counted == {"explicit": 1, "alias": 1, "alpha": 1, "fallback": 2}
    assert [(one.exposures, one.units) for one in found.variants] == [(2, 2)]


async def test_a_random_request_is_a_unit_of_its_own(open_store: Open) -> None:
    """Requests without a key are independent: 10 of them are 10 units."""
    store = open_store()
    for exposure in many(10, reason="random"):
        store.record(replace(exposure, unit=""))
        await store.add(Outcome(exposure.request_id, 1.0, score=float(exposure.request_id[1:])))
    (found,) = await store.experiments({"assistant": SPLIT})
    assert found.variants[0].units == 10
    assert found.variants[0].mean_score is not None
    assert found.variants[0].mean_score.value == 4.5


async def test_a_later_vote_of_a_request_replaces_the_earlier(open_store: Open, path: Path) -> None:
    """And leaves what it doesn't speak of."""
    store = open_store()
    store.record(EXPOSURE)
    await store.add(Outcome("r", 1.0, vote="up", comment="good"))
    await store.add(Outcome("r", 0.5, vote="down"))
    await store.add(Outcome("r", 2.0, score=0.25))
    assert query(path, "SELECT at, score, vote, comment FROM outcomes") == [
        (2.0, 0.25, "down", "good")
    ]


async def test_a_long_comment_is_cut(open_store: Open, path: Path) -> None:
    """A client can't fill the disk with one."""
    store = open_store()
    store.record(EXPOSURE)
    await store.add(Outcome("r", 1.0, comment="x" * 10**6))
    assert query(path, "SELECT length(comment) FROM outcomes") == [(4000,)]


async def test_feedback_goes_to_the_last_request_of_an_id(open_store: Open) -> None:
    """Clients choose ids, and may send one twice."""
    store = open_store()
    store.record(EXPOSURE)
    store.record(replace(EXPOSURE, variant="enhanced@1"))
    await store.add(Outcome("r", 1.0, vote="up"))
    (found,) = await store.experiments({"assistant": SPLIT})
    assert [one.votes for one in found.variants] == [0, 1]


@pytest.mark.parametrize(("keep_prompts", "expected"), [(False, []), (True, [(b'{"a": 1}',)])])
async def test_prompts_are_stored_only_when_asked_for(
    open_store: Open, path: Path, *, keep_prompts: bool, expected: list[Any]
) -> None:
    """Off by default; and no prompt shows in a repr, which may be logged."""
    store = open_store(keep_prompts=keep_prompts)
    exposure = replace(EXPOSURE, prompt=b'{"a": 1}')
    store.record(exposure)
    await store.flush()
    assert query(path, "SELECT prompt FROM prompts") == expected
    assert b"{".decode() not in repr(exposure)


async def test_rows_that_cannot_be_stored_hold_nothing_up(open_store: Open, path: Path) -> None:
    """Surrogates and NUL are escaped or kept, NaN is null, what is no number is dropped."""
    store = open_store()
    store.record(replace(EXPOSURE, request_id="\udc80\0" + "x" * 1000, at=float("nan")))
    store.record(replace(EXPOSURE, prompt_tokens=10**30, ttft_seconds=float("inf")))
    store.record(replace(EXPOSURE, variant=None))  # type: ignore[arg-type]
    store.record(replace(EXPOSURE, duration_seconds="x"))  # type: ignore[arg-type]
    store.record(replace(EXPOSURE, request_id="last"))
    assert await store.add(Outcome("last", float("inf"), score=float("nan"), vote="up"))
    assert await store.add(Outcome("\udc80\0" + "x" * 1000, 1.0, vote="up"))
    assert store.dropped == 2
    assert query(path, "SELECT count(*) FROM exposures") == [(3,)]


async def test_a_clock_that_jumps_changes_nothing(open_store: Open) -> None:
    """Exposures from 1970, from the future and out of order; the split of now is known by order."""
    store = open_store()
    store.note_split("assistant", {"base": 9, "enhanced@1": 1})
    for at, exposure in zip((9e12, -5.0, 0.0), many(3), strict=True):
        store.record(replace(exposure, at=at))
    store.note_split("assistant", SPLIT)
    for exposure in many(40, at=-1e9):
        variant = ("base", "enhanced@1")[int(exposure.request_id[1:]) % 2]
        store.record(replace(exposure, variant=variant))
    (found,) = await store.experiments({"assistant": SPLIT})
    assert found.sample_ratio_p == 1.0
    assert "The split was changed meanwhile" in found.caution


async def test_the_split_of_now_is_tested_by_what_came_since(open_store: Open, path: Path) -> None:
    """Also without the configuration, from the file; the same shares are the same split."""
    store = open_store()
    store.note_split("assistant", {"base": 90, "enhanced@1": 10})
    for exposure in many(90):
        store.record(exposure)
    store.note_split("assistant", {"base": 50, "enhanced@1": 50})
    for exposure in many(40, variant="enhanced@1"):
        store.record(exposure)
    store.note_split("assistant", {"enhanced@1": 1, "base": 1})
    for exposure in many(40):
        store.record(exposure)
    await store.flush()
    (found,) = read_experiments(path)
    assert [one.variant for one in found.variants] == ["enhanced@1", "base"]
    assert [one.realised_share for one in found.variants] == [0.5, 0.5]
    (found,) = await store.experiments({"assistant": {"base": 1, "enhanced@1": 3}})
    assert found.sample_ratio_p is None


async def test_a_restart_goes_on_with_the_same_file(open_store: Open, path: Path) -> None:
    """close() writes all that waits; the next store adds to it, and notes the split no twice."""
    for n in range(2):
        store = open_store()
        store.note_split("assistant", SPLIT)
        store.record(replace(EXPOSURE, request_id=f"r{n}"))
        store.close()
        assert store.dropped == 0
    assert query(path, "SELECT request_id FROM exposures") == [("r0",), ("r1",)]
    assert query(path, "SELECT count(*) FROM splits") == [(1,)]


async def test_only_the_owner_may_read_the_file(open_store: Open, path: Path) -> None:
    """Mode 0600, of what lies beside it too."""
    store = open_store()
    store.record(EXPOSURE)
    await store.flush()
    assert [stat.S_IMODE(file.stat().st_mode) for file in beside(path)] == [0o600] * 3


async def test_a_locked_file_costs_nothing_but_time(
    open_store: Open, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Recording goes on at once; feedback is refused; when the lock is gone all is written."""
    caplog.set_level(logging.WARNING)
    store = open_store()
    with closing(lock(path)):
        began = time.monotonic()
        for exposure in many(2000):
            store.record(exposure)
        assert time.monotonic() - began < 0.5
        for _ in range(2):
            with pytest.raises(ResultsUnavailableError, match="can't be stored now"):
                await store.add(Outcome("r0", 1.0, vote="up"))
        await asyncio.sleep(RETRY_SECONDS * 1.5)
        assert await store.experiments({"assistant": SPLIT})
    await written(store)
    assert query(path, "SELECT count(*) FROM exposures") == [(2000,)]
    assert store.dropped == 0
    assert [record.getMessage()[:8] for record in caplog.records] == ["results:"] * 2


async def test_a_lock_at_the_start_is_no_error(open_store: Open, path: Path) -> None:
    """The store starts, and writes when it can."""
    open_store().close()
    other = lock(path)
    store = open_store()
    store.record(EXPOSURE)
    other.close()
    await written(store)
    assert query(path, "SELECT count(*) FROM exposures") == [(1,)]


async def test_what_waits_is_bounded(open_store: Open, path: Path) -> None:
    """A file that stays locked costs rows beyond the queue, counted; close() ends all the same."""
    store = open_store()
    with closing(lock(path)):
        for exposure in many(QUEUE_ROWS + 1500):
            store.record(exposure)
        assert 0 < store.dropped <= 1500
        began = time.monotonic()
        await asyncio.to_thread(store.close)
        assert time.monotonic() - began < 7
    assert store.dropped == QUEUE_ROWS + 1500
    store.record(EXPOSURE)
    with pytest.raises(ResultsUnavailableError, match="closed"):
        await store.add(Outcome("r", 1.0))


async def test_prompts_that_wait_are_bounded_in_bytes(open_store: Open, path: Path) -> None:
    """Large bodies don't fill the memory while the file is locked."""
    store = open_store(keep_prompts=True)
    with closing(lock(path)):
        for exposure in many(200):
            store.record(replace(exposure, prompt=bytes(2**20)))
        assert store.dropped >= 200 - 128 - 1
    await written(store)
    assert query(path, "SELECT DISTINCT length(prompt) FROM prompts") == [(256 * 2**10,)]


async def test_a_full_disk_is_survived(
    open_store: Open,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """SQLite's own "disk is full": rows wait, feedback is refused, and room brings it back."""
    room = [30]

    def small(file: Path) -> sqlite3.Connection:
        connection = open_for_writing(file)
        connection.execute(f"PRAGMA max_page_count = {room[0]}")
        return connection

    monkeypatch.setattr(writer_module, "open_for_writing", small)
    store = open_store()
    for exposure in many(3000):
        store.record(exposure)
    await until(lambda: "disk is full" in caplog.text)
    with pytest.raises(ResultsUnavailableError):
        await store.add(Outcome("r0", 1.0, vote="up"))
    room[0] = 2**30
    await written(store)
    assert query(path, "SELECT count(*) FROM exposures") == [(3000,)]
    assert await store.add(Outcome("r0", 1.0, vote="up"))


async def test_a_bug_in_writing_costs_a_batch_and_no_more(
    open_store: Open, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread logs the traceback and goes on."""
    store = open_store()

    def broken(*_arguments: object) -> int:
        monkeypatch.setattr(writer_module, "insert_exposures", insert_exposures)
        raise KeyError("a bug")

    monkeypatch.setattr(writer_module, "insert_exposures", broken)
    store.record(EXPOSURE)
    with pytest.raises(ResultsUnavailableError, match="internal error"):
        await store.flush()
    store.record(EXPOSURE)
    await store.flush()
    assert store.dropped == 1
    assert "a bug" in caplog.text
    assert query(path, "SELECT count(*) FROM exposures") == [(1,)]


async def test_a_file_that_was_moved_away_is_made_anew(open_store: Open, path: Path) -> None:
    """An operator's mv or rm: what comes after it is in a new file."""
    store = open_store()
    store.record(EXPOSURE)
    await store.flush()
    for file in beside(path):
        file.unlink()
    store.record(EXPOSURE)
    await store.flush()
    assert query(path, "SELECT count(*) FROM exposures") == [(1,)]


async def fill(store: ResultsStore, first: str) -> None:
    """A little more than a file of 1 MiB holds; the next commit rotates it."""
    store.record(replace(EXPOSURE, request_id=first, unit=first))
    for i in range(5000):
        store.record(replace(EXPOSURE, request_id=f"{first}-{i}" + "x" * 60, unit=f"u{i}"))
    await store.flush()


async def test_a_large_file_is_rotated_and_still_counts(open_store: Open, path: Path) -> None:
    """It is moved whole; summaries and feedback reach back, and the split is one over both."""
    store = open_store(max_mib=1)
    store.note_split("assistant", {"base": 1, "enhanced@1": 0})
    await fill(store, "a")
    store.record(replace(EXPOSURE, request_id="b", unit="b"))
    await store.flush()
    rotated = path.with_name("results.sqlite.1")
    assert rotated.stat().st_size > 0.5 * 2**20
    assert stat.S_IMODE(rotated.stat().st_mode) == 0o600
    assert not path.with_name("results.sqlite.1-wal").exists()
    assert query(path, "SELECT request_id FROM exposures")[-1] == ("b",)
    assert await store.add(Outcome("a", 1.0, vote="up"))
    assert not await store.add(Outcome("c", 1.0, vote="up"))
    assert query(rotated, "SELECT vote FROM outcomes") == [("up",)]
    (found,) = await store.experiments({})
    assert (found.variants[0].exposures, found.variants[0].votes) == (5002, 1)
    assert found.variants[0].units == 5002
    assert found.variants[0].realised_share == 1.0


@pytest.mark.parametrize("keep_files", [0, 1, 2])
async def test_only_so_many_files_are_kept(open_store: Open, path: Path, keep_files: int) -> None:
    """The newest; .1 is the newest of them."""
    store = open_store(max_mib=1, keep_files=keep_files)
    for first in "abcd":
        await fill(store, first)
    store.record(EXPOSURE)
    await store.flush()
    names = sorted(file.name for file in beside(path) if file.suffix[1:].isdigit())
    assert names == [f"results.sqlite.{n}" for n in range(1, keep_files + 1)]
    files = [path.with_name(name) for name in reversed(names)] + [path]
    kept = [first for file in files for (first,) in query(file, FIRSTS)]
    assert kept == sorted(kept)
    assert kept[-1] == "r"


async def test_a_file_that_is_open_elsewhere_is_not_moved(
    open_store: Open, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Moving it from under another process would damage it: it grows, up to twice its size."""
    store = open_store(max_mib=1)
    store.record(EXPOSURE)
    await store.flush()
    with closing(sqlite3.connect(path)) as other:
        other.execute("SELECT count(*) FROM exposures").fetchall()
        for first in "abcd":
            try:
                await fill(store, first)
            except ResultsUnavailableError:
                break
        assert not path.with_name("results.sqlite.1").exists()
        assert path.stat().st_size < 4 * 2**20  # noqa: ASYNC240 - a test
        assert "can't be rotated yet" in caplog.text
    store._writer._rotate_at = 0.0  # rather than wait ten seconds
    await written(store)
    assert path.with_name("results.sqlite.1").exists()


def write_text(path: Path) -> None:
    path.write_bytes(b"not a database " * 100)


def write_foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t (x)")


def write_later(path: Path) -> None:
    open_for_writing(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 7")


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (write_text, "not a database"),
        (write_foreign, "another program's"),
        (write_later, "version is 7"),
    ],
)
def test_what_is_not_ours_is_refused_and_left_as_it_is(
    path: Path, write: Callable[[Path], None], words: str
) -> None:
    """Text, another program's database, a later version: a clear error, no byte changed."""
    write(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=words):
        ResultsStore(ResultsConfig(path=str(path))).start()
    with pytest.raises(ConfigError, match=words):
        read_experiments(path)
    assert path.read_bytes() == before


def test_a_place_that_can_not_be_written_is_a_config_error(tmp_path: Path) -> None:
    """No such folder; a folder instead of a file."""
    for place in (tmp_path / "none" / "r.sqlite", tmp_path):
        with pytest.raises(ConfigError, match="Results can't be kept in"):
            ResultsStore(ResultsConfig(path=str(place))).start()
    with pytest.raises(ConfigError, match="there is no such file"):
        read_experiments(tmp_path / "none" / "r.sqlite")


async def test_a_file_that_is_written_can_be_read(open_store: Open, path: Path) -> None:
    """With what is not checkpointed yet."""
    store = open_store()
    store.record(EXPOSURE)
    await store.flush()
    assert [one.variants[0].exposures for one in read_experiments(path)] == [1]


def test_reading_changes_nothing(path: Path) -> None:
    """Also where file and folder are read-only."""
    store = ResultsStore(ResultsConfig(path=str(path)))
    store.start()
    store.record(EXPOSURE)
    store.close()
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    path.chmod(0o400)
    path.parent.chmod(0o500)
    try:
        assert [one.variants[0].exposures for one in read_experiments(path)] == [1]
    finally:
        path.parent.chmod(0o700)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_the_configuration_is_checked() -> None:
    """Unknown keys, sizes of nothing."""
    assert ResultsConfig(path="r").max_mib == 512
    for wrong in ({"max_mib": 0}, {"keep_files": -1}, {"keep_prompt": True}, {"path": ""}):
        with pytest.raises(ValidationError):
            ResultsConfig.model_validate({"path": "r"} | wrong)


def test_the_error_is_one_of_ours() -> None:
    """A handler catches it with all others."""
    assert issubclass(ResultsUnavailableError, RvecError)
