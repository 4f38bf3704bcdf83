"""The SQLite file: its tables, how it is opened, and what is not touched.

A file is known by its application id and version; anything else is refused and left as it is.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING

from vllm_rvec.errors import ConfigError, RvecError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = [
    "BUSY_SECONDS",
    "ResultsUnavailableError",
    "attach",
    "is_passing",
    "open_for_writing",
    "seal",
]

APPLICATION_ID = 0x72766563  # "rvec"
VERSION = 1
BUSY_SECONDS = 1.0
"""How long a write waits for another process's lock."""
FILE_MODE = 0o600
"""SQLite gives the same to the -wal and -shm files beside it."""

PASSING = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PROTOCOL,
}
"""Primary result codes of what may be over in a moment."""

TABLES = """
CREATE TABLE splits (
    id INTEGER PRIMARY KEY, experiment TEXT NOT NULL, weights TEXT NOT NULL, at REAL
);
CREATE INDEX splits_by_experiment ON splits (experiment);
CREATE TABLE exposures (
    id INTEGER PRIMARY KEY, request_id TEXT NOT NULL, at REAL, experiment TEXT NOT NULL,
    variant TEXT NOT NULL, reason TEXT NOT NULL, unit TEXT NOT NULL, split INTEGER NOT NULL,
    status INTEGER, is_error INTEGER NOT NULL, ttft_seconds REAL, duration_seconds REAL,
    prompt_tokens INTEGER, completion_tokens INTEGER
);
CREATE INDEX exposures_by_request ON exposures (request_id);
CREATE INDEX exposures_by_unit ON exposures
    (experiment, variant, unit, reason, split, is_error);
CREATE TABLE outcomes (
    exposure INTEGER PRIMARY KEY REFERENCES exposures (id), at REAL, score REAL, vote TEXT,
    comment TEXT
);
CREATE TABLE prompts (
    exposure INTEGER PRIMARY KEY REFERENCES exposures (id), prompt BLOB NOT NULL
);
"""
"""Prompts lie apart, so that a summary doesn't read past them."""


class ResultsUnavailableError(RvecError, RuntimeError):
    """The results can't be read or written now; later they may."""


def open_for_writing(path: Path) -> sqlite3.Connection:
    """Open a file, made with its tables where there is none, in WAL mode.

    Args:
        path: In a folder that exists.

    Returns:
        A connection without implicit transactions, for the calling thread.

    Raises:
        ConfigError: Not SQLite, not ours, or of another version. It is left as it is.
        sqlite3.Error: Locked, full, no permission.
    """
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, FILE_MODE))
    connection = _connect(f"{path.absolute().as_uri()}?mode=rw")
    try:
        _prepare(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def attach(connection: sqlite3.Connection, path: Path, name: str) -> None:
    """Add a file to a connection for reading.

    Args:
        connection: One that was opened with `uri=True`.
        path: The file.
        name: What queries call it.

    Raises:
        ConfigError: There is no such file, or it's not ours.
        sqlite3.Error: It can't be read now.
    """
    if not path.is_file():
        raise ConfigError(
            f"There are no results in {path}.",
            why="it is not a file" if path.exists() else "there is no such file",
            fix="Give the file that `results: {path: ...}` names in the router's configuration.",
            path=path,
        )
    uri = path.absolute().as_uri()
    try:
        _attach_checked(connection, f"{uri}?mode=ro", path, name)
    except sqlite3.OperationalError as exc:
        if exc.sqlite_errorcode & 0xFF not in {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}:
            raise
        # Reading WAL needs a -shm file, which a folder that is read-only can't be given.
        with suppress(sqlite3.OperationalError):
            connection.execute(f"DETACH {name}")
        _attach_checked(connection, f"{uri}?immutable=1", path, name)


def seal(path: Path) -> None:
    """Bring all of a file's rows into the file itself, so that it may be moved.

    Raises:
        sqlite3.Error: Somebody else has it open: then it may not.
    """
    with closing(_connect(f"{path.absolute().as_uri()}?mode=rw")) as connection:
        connection.execute("PRAGMA journal_mode = DELETE").fetchall()


def is_passing(error: sqlite3.Error) -> bool:
    """Whether an error may be over in a moment: a lock, a full disk."""
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    return code & 0xFF in PASSING


def _connect(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    # Read before anything is written: the journal mode is written into the file as well.
    if _is_ours(connection, path, "main"):
        _set_journal(connection)
        return
    _set_journal(connection)
    connection.execute("BEGIN IMMEDIATE")
    if not _is_ours(connection, path, "main"):  # else another process was quicker
        for statement in TABLES.split(";"):
            connection.execute(statement)  # not executescript(), which commits first
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")


def _set_journal(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL").fetchall()
    # In WAL mode a power cut may lose the last commits, but never damages the file.
    connection.execute("PRAGMA synchronous = NORMAL")


def _attach_checked(connection: sqlite3.Connection, uri: str, path: Path, name: str) -> None:
    with _refusing_others(path):
        connection.execute(f"ATTACH ? AS {name}", (uri,))
    if not _is_ours(connection, path, name):
        raise _not_ours(path, "it is empty")


@contextmanager
def _refusing_others(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as exc:
        if getattr(exc, "sqlite_errorcode", 0) in {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT}:
            raise _not_ours(path, str(exc)) from exc
        raise


def _is_ours(connection: sqlite3.Connection, path: Path, name: str) -> bool:
    """Whether the tables are there; false for an empty file, an error for any other."""
    with _refusing_others(path):
        application = _pragma(connection, name, "application_id")
        version = _pragma(connection, name, "user_version")
        is_empty = not _pragma(connection, name, "schema_version")
    if application == APPLICATION_ID and version != VERSION:
        raise _not_ours(path, f"its version is {version}, and this program knows {VERSION}")
    if application != APPLICATION_ID and not is_empty:
        raise _not_ours(path, "it is another program's SQLite file")
    return application == APPLICATION_ID


def _pragma(connection: sqlite3.Connection, name: str, pragma: str) -> int:
    return int(connection.execute(f"PRAGMA {name}.{pragma}").fetchone()[0])


def _not_ours(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path} is not a file of results that this version uses.",
        why=why,
        fix="Name another file, or move this one away. It was not changed.",
        path=path,
    )
