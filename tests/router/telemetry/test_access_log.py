"""One JSON line for each request, and nothing that a client could do with it."""

from __future__ import annotations

import doctest
import json
import logging
import os
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vllm_rvec.errors import ConfigError
from vllm_rvec.router.telemetry import AccessLog, AccessRecord, access_log, trace_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NOW = 1_763_000_000.25
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


def record(**fields: Any) -> AccessRecord:
    given: dict[str, Any] = {
        "request_id": "r-1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "duration_ms": 12.34567,
    }
    return AccessRecord(**(given | fields))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "access.jsonl"


@pytest.fixture
def open_log() -> Iterator[Callable[..., AccessLog]]:
    logs: list[AccessLog] = []

    def open_(target: str | Path) -> AccessLog:
        logs.append(AccessLog(target, lambda: NOW))
        return logs[-1]

    yield open_
    for log in logs:
        log.close()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_request_is_one_line_of_json(open_log: Callable[..., AccessLog], path: Path) -> None:
    """With all fields, in one order; those that aren't known are null."""
    log = open_log(path)
    log.write(
        record(
            variant="enhanced@1",
            alias="assistant",
            reason="sticky",
            alpha="1",
            key="team-a",
            ttft_ms=3.0,
            prompt_tokens=7,
            completion_tokens=3,
            client="10.0.0.1",
            traceparent=f"00-{TRACE}-{PARENT}-01",
        )
    )
    log.flush()
    assert list(read(path)[0].items()) == [
        ("time", "2025-11-13T02:13:20.250Z"),
        ("request_id", "r-1"),
        ("method", "POST"),
        ("path", "/v1/chat/completions"),
        ("status", 200),
        ("variant", "enhanced@1"),
        ("alias", "assistant"),
        ("reason", "sticky"),
        ("alpha", "1"),
        ("key", "team-a"),
        ("duration_ms", 12.346),
        ("ttft_ms", 3.0),
        ("prompt_tokens", 7),
        ("completion_tokens", 3),
        ("error", None),
        ("client", "10.0.0.1"),
        ("trace_id", TRACE),
    ]


def test_lines_come_without_anybody_asking(open_log: Callable[..., AccessLog], path: Path) -> None:
    """The thread writes them, in their order."""
    log = open_log(path)
    for number in range(1000):
        log.write(record(request_id=str(number)))
    wait_until(lambda: path.read_bytes().count(b"\n") == 1000)
    assert [line["request_id"] for line in read(path)] == [str(n) for n in range(1000)]


def test_closing_writes_what_waits(path: Path) -> None:
    """The last requests before a stop are in the log."""
    log = AccessLog(path)
    log.write(record())
    log.close()
    assert len(read(path)) == 1
    log.close()


@pytest.mark.parametrize(
    "forged",
    [
        'x"}\n{"request_id":"forged"}\n',
        "\r\n\x00\x1b[2J\u2028\u2029\x85",
        "\ud800\U0001f600é" * 99_999,
    ],
)
def test_no_line_can_be_forged(open_log: Callable[..., AccessLog], path: Path, forged: str) -> None:
    """Headers and paths are anybody's: they are cut, and all but ASCII is escaped."""
    log = open_log(path)
    names = ("request_id", "method", "path", "variant", "alias", "reason", "alpha", "key")
    log.write(record(**dict.fromkeys((*names, "error", "client", "traceparent"), forged)))
    log.flush()
    text = path.read_bytes()
    assert text.count(b"\n") == 1
    assert len(text) < 32 * 1024
    assert all(32 <= byte < 127 for byte in text[:-1])
    (line,) = read(path)
    assert line["request_id"].startswith(forged[:200])
    assert line["trace_id"] is None


def test_a_query_is_not_logged(open_log: Callable[..., AccessLog], path: Path) -> None:
    """There may be a key in it."""
    log = open_log(path)
    log.write(record(path="/v1/models?api_key=secret"))
    log.flush()
    assert read(path)[0]["path"] == "/v1/models"
    assert b"secret" not in path.read_bytes()


def test_a_new_file_is_its_owners_and_an_old_one_is_appended_to(path: Path) -> None:
    """Its mode is 0600; one that somebody made otherwise is left as it is."""
    for _ in range(2):
        log = AccessLog(path)
        log.write(record())
        log.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(read(path)) == 2
    path.chmod(0o640)
    AccessLog(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_after_a_rotation_lines_go_to_the_new_file(
    open_log: Callable[..., AccessLog], path: Path
) -> None:
    """Logrotate renames the file, then sends SIGHUP."""
    log = open_log(path)
    log.write(record(request_id="old"))
    log.flush()
    path.rename(rotated := path.with_suffix(".1"))
    log.reopen()
    log.write(record(request_id="new"))
    log.flush()
    assert [line["request_id"] for line in read(rotated)] == ["old"]
    assert [line["request_id"] for line in read(path)] == ["new"]


def test_a_rotation_needs_no_further_line(open_log: Callable[..., AccessLog], path: Path) -> None:
    """The old file is let go at once: logrotate may be about to compress it."""
    log = open_log(path)
    path.unlink()
    log.reopen()
    wait_until(path.exists)


def test_a_rotation_that_fails_goes_on_in_the_old_file(
    open_log: Callable[..., AccessLog], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And says so."""
    folder = tmp_path / "logs"
    folder.mkdir()
    log = open_log(folder / "access.jsonl")
    folder.rename(tmp_path / "moved")
    log.reopen()
    log.write(record())
    log.flush()
    assert len(read(tmp_path / "moved" / "access.jsonl")) == 1
    assert "stays in its old file: No such file or directory" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_once_and_fails_no_request(
    open_log: Callable[..., AccessLog], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Lost lines are counted; after the next rotation it would be told again."""
    path.symlink_to("/dev/full")
    log = open_log(path)
    for _ in range(3):
        log.write(record())
        log.flush()
    assert log.lost_lines == 3
    told = "lines of the access log are lost: No space left on device"
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [told]
    path.unlink()
    log.reopen()
    log.write(record())
    log.flush()
    assert len(read(path)) == 1


def test_a_line_that_was_cut_off_does_not_spoil_the_next_one(
    open_log: Callable[..., AccessLog], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up takes the begin of a line."""
    log = open_log(path)
    write, room = os.write, [10, 0]

    def scarce(fd: int, data: bytes) -> int:
        if room and (left := room.pop(0)) == 0:
            raise OSError(28, "No space left on device")
        return write(fd, data[:left]) if room else write(fd, data)

    monkeypatch.setattr(os, "write", scarce)
    log.write(record(request_id="lost"))
    log.flush()
    log.write(record(request_id="whole"))
    log.flush()
    begun, line = path.read_text().splitlines()
    assert len(begun) == 10
    assert json.loads(line)["request_id"] == "whole"


def test_a_pipe_that_nobody_reads_delays_nobody(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Lines beyond a bound are lost; they come again when somebody reads."""
    monkeypatch.setattr(access_log, "WAITING_LINES", 500)
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log = AccessLog(path)
    try:
        started = time.monotonic()
        while log.lost_lines == 0:
            log.write(record())
            assert time.monotonic() - started < 10
        assert "written too slowly" in caplog.text
        os.set_blocking(reader, True)
        assert b'"request_id":"r-1"' in os.read(reader, 1000)
    finally:
        os.close(reader)
        log.close()


def test_a_dash_is_stderr(
    open_log: Callable[..., AccessLog], capfd: pytest.CaptureFixture[str]
) -> None:
    """Stdout is for results."""
    log = open_log("-")
    log.write(record())
    log.reopen()
    log.flush()
    said = capfd.readouterr()
    assert json.loads(said.err)["request_id"] == "r-1"
    assert said.out == ""


def test_a_file_that_cannot_be_opened_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    """At the start, with the reason and what to do."""
    with pytest.raises(ConfigError) as caught:
        AccessLog(tmp_path / "missing" / "access.jsonl")
    assert str(caught.value) == (
        f"Can't write the access log {tmp_path}/missing/access.jsonl.\n"
        "  why: No such file or directory\n"
        "  do:  Name a file in a folder that is there and may be written to, or `-` for stderr."
    )


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (f"00-{TRACE}-{PARENT}-01", TRACE),
        (f"01-{TRACE}-{PARENT}-01-more", TRACE),
        (f"00-{TRACE}-{PARENT}-01-more", None),
        (f"ff-{TRACE}-{PARENT}-01", None),
        (f"00-{'0' * 32}-{PARENT}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{PARENT}-01", None),
        (f"00-{TRACE}-{PARENT}-01\n", None),
        (f"00-{TRACE}-{PARENT}", None),
        ("", None),
        (None, None),
    ],
)
def test_a_trace_id_is_that_of_a_valid_traceparent(header: str | None, found: str | None) -> None:
    """By the rules of W3C Trace Context."""
    assert trace_id(header) == found


def test_the_examples_in_the_documentation_hold() -> None:
    """The doctests pass."""
    assert doctest.testmod(access_log).failed == 0
