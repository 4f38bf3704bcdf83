"""Rows into tables: exposures with the split they were drawn from, outcomes to their exposures.

One transaction at a time, on a connection that `store` opens and closes.
"""

from __future__ import annotations

import json
import math
import sqlite3
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vllm_rvec.router.results.rows import Exposure, Outcome

__all__ = ["SplitRows", "insert_exposures", "split_text", "update_outcome"]

MAX_TEXT = 512
"""Characters of a name or an id; a request's id is anybody's."""
MAX_COMMENT = 4000
"""Characters of a comment."""
MAX_INTEGER = 2**62

INSERT_EXPOSURE = (
    "INSERT INTO exposures (request_id, at, experiment, variant, reason, unit, split, status,"
    " is_error, ttft_seconds, duration_seconds, prompt_tokens, completion_tokens)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
# A client may send an id twice: what it says later is about the last one.
FIND_EXPOSURE = "SELECT id FROM exposures WHERE request_id = ? ORDER BY id DESC LIMIT 1"
UPDATE_OUTCOME = (
    "INSERT INTO outcomes (exposure, at, score, vote, comment) VALUES (?, ?, ?, ?, ?)"
    " ON CONFLICT (exposure) DO UPDATE SET at = excluded.at,"
    " score = coalesce(excluded.score, score), vote = coalesce(excluded.vote, vote),"
    " comment = coalesce(excluded.comment, comment)"
)
NEWEST_SPLITS = (
    "SELECT experiment, id, weights FROM splits WHERE id IN"
    " (SELECT max(id) FROM splits GROUP BY experiment)"
)
INSERT_SPLIT = "INSERT INTO splits (experiment, weights, at) VALUES (?, ?, ?)"


class SplitRows:
    """Which row of `splits` each experiment's exposures refer to, in one file.

    Args:
        connection: To the file.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._rows: dict[str, tuple[int, str]] = {
            experiment: (row, weights)
            for experiment, row, weights in connection.execute(NEWEST_SPLITS)
        }

    def find(
        self, connection: sqlite3.Connection, experiment: str, weights: str | None, at: float
    ) -> int:
        """The row of these weights, made where they are new; 0 where they were never noted."""
        if weights is None:
            return 0
        row, known = self._rows.get(experiment, (0, None))
        if known != weights:
            row = connection.execute(INSERT_SPLIT, (_text(experiment), weights, at)).lastrowid or 0
            self._rows[experiment] = (row, weights)
        return row


def split_text(weights: Mapping[str, float]) -> str:
    """Weights as they are stored: JSON, in the order given, for the first is compared with."""
    return json.dumps({name: float(weight) for name, weight in weights.items()})


def insert_exposures(
    connection: sqlite3.Connection,
    rows: Iterable[tuple[Exposure, str | None]],
    splits: SplitRows,
) -> int:
    """Insert exposures, within a transaction of the caller's.

    Args:
        connection: To the file.
        rows: Each exposure with the text of its split.
        splits: Of the same file.

    Returns:
        How many could not be stored for what is in them.
    """
    refused = 0
    for exposure, weights in rows:
        try:
            split = splits.find(connection, exposure.experiment, weights, _number(exposure.at) or 0)
            row = connection.execute(INSERT_EXPOSURE, _values(exposure, split)).lastrowid
            if exposure.prompt is not None:
                prompt = bytes(exposure.prompt)
                connection.execute("INSERT INTO prompts VALUES (?, ?)", (row, prompt))
        except (TypeError, ValueError, AttributeError, sqlite3.IntegrityError):
            # One such row must not hold up those behind it.
            refused += 1
    return refused


def update_outcome(connection: sqlite3.Connection, outcome: Outcome) -> bool:
    """Store an outcome, within a transaction of the caller's; what it says replaces the earlier.

    Returns:
        Whether its request is in this file.
    """
    found = connection.execute(FIND_EXPOSURE, (_text(outcome.request_id),)).fetchone()
    if found is None:
        return False
    comment = None if outcome.comment is None else _text(outcome.comment, MAX_COMMENT)
    values = (found[0], _number(outcome.at), _number(outcome.score), outcome.vote, comment)
    connection.execute(UPDATE_OUTCOME, values)
    return True


def _values(exposure: Exposure, split: int) -> tuple[object, ...]:
    return (
        _text(exposure.request_id),
        _number(exposure.at),
        _text(exposure.experiment),
        _text(exposure.variant),
        _text(exposure.reason),
        _text(exposure.unit),
        split,
        _integer(exposure.status),
        int(bool(exposure.is_error)),
        _number(exposure.ttft_seconds),
        _number(exposure.duration_seconds),
        _integer(exposure.prompt_tokens),
        _integer(exposure.completion_tokens),
    )


def _text(text: str, limit: int = MAX_TEXT) -> str:
    # Headers come with surrogates for bytes that aren't UTF-8; SQLite takes none.
    return str(text[:limit]).encode(errors="backslashreplace").decode()


def _number(number: float | None) -> float | None:
    return float(number) if number is not None and math.isfinite(number) else None


def _integer(number: int | None) -> int | None:
    return None if number is None else max(-MAX_INTEGER, min(MAX_INTEGER, int(number)))
