"""The files of the results, read: sums of each experiment and variant, for `report`.

Opens everything read-only and changes nothing. Sums are made in SQL, outside Python's lock, so that
a summary doesn't slow the requests down that are being served.
"""

from __future__ import annotations

import itertools
import json
import math
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

from vllm_rvec.router.assignment import Reason
from vllm_rvec.router.results.report import VariantCounts, summarise
from vllm_rvec.router.results.rotation import result_files
from vllm_rvec.router.results.schema import BUSY_SECONDS, ResultsUnavailableError, attach
from vllm_rvec.router.results.statistics import Clusters

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from vllm_rvec.router.results.report import ExperimentSummary

__all__ = ["read_experiments"]

MAX_FILES = 10
"""The newest: as many as SQLite attaches."""
LATENCY_ROWS = 20_000
"""Of each variant, the newest: quantiles are of late, and sorting stays cheap."""

ASSIGNED = (Reason.STICKY.value, Reason.RANDOM.value)
COUNTED = "reason IN ('{}', '{}')".format(*ASSIGNED)
"""Only what the split assigned compares like with like."""

EXPERIMENTS = f"SELECT DISTINCT experiment FROM answered WHERE {COUNTED} AND experiment <> ''"  # noqa: S608 - our own constant
COUNT = (
    "INSERT INTO counted SELECT %d, variant, unit, reason, split, count(*), sum(is_error)"
    " FROM file%d.exposures WHERE experiment = ? GROUP BY variant, unit, reason, split"
)
"""In the order of the index, file by file: far quicker than sorting all files' rows together."""
REASONS = "SELECT reason, sum(n) FROM counted GROUP BY reason"
TOTALS = (
    "SELECT variant, count(*), total(prompt_tokens), total(completion_tokens) FROM answered"  # noqa: S608 - our own constant
    f" WHERE +experiment = ? AND {COUNTED} GROUP BY variant"
)
"""The plus keeps the index out of it: it has no tokens, and a row found by it is a page read."""
UNITS = (
    "SELECT variant, count(DISTINCT nullif(unit, '')) + sum(CASE unit WHEN '' THEN n ELSE 0 END)"  # noqa: S608 - our own constant
    f" FROM counted WHERE {COUNTED} AND (%s) GROUP BY variant"
)
ERRORS = (
    "WITH keyed AS (SELECT variant, sum(n) AS n, sum(errors) AS s FROM counted"  # noqa: S608 - our own constant
    f" WHERE {COUNTED} AND unit <> '' GROUP BY variant, unit),"
    " clusters AS (SELECT variant, 1 AS units, n, n * n AS nn, s, s * s AS ss, s * n AS sn"
    " FROM keyed UNION ALL SELECT variant, n, n, n, errors, errors, errors"
    f" FROM counted WHERE {COUNTED} AND unit = '')"
    " SELECT variant, sum(units), total(n), total(nn), total(s), total(ss), total(sn)"
    " FROM clusters GROUP BY variant"
)
SUMS = (
    "WITH rated AS NOT MATERIALIZED (SELECT variant, unit, %s AS value FROM answered"  # noqa: S608 - our own constant
    f" WHERE experiment = ? AND {COUNTED}),"
    " clusters AS (SELECT variant, count(*) AS n, total(value) AS s FROM rated"
    " WHERE value IS NOT NULL AND unit <> '' GROUP BY variant, unit"
    " UNION ALL SELECT variant, 1, value FROM rated WHERE value IS NOT NULL AND unit = '')"
    " SELECT variant, count(*), total(n), total(n * n), total(s), total(s * s), total(s * n)"
    " FROM clusters GROUP BY variant"
)
LATENCIES = (
    # Per token of a stream, as vLLM's `time_per_output_token`: without the first.
    "SELECT ttft_seconds, duration_seconds,"  # noqa: S608 - our own constant
    " CASE WHEN completion_tokens > 1"
    " THEN (duration_seconds - ttft_seconds) / (completion_tokens - 1) END FROM file%d.exposures"
    f" WHERE +experiment = ? AND variant = ? AND {COUNTED} AND NOT is_error"
    " ORDER BY id DESC LIMIT ?"
)
SPLITS = "SELECT file, id, weights FROM noted WHERE experiment = ? ORDER BY file, id DESC"


def read_experiments(
    path: Path, configured: Mapping[str, Mapping[str, float]] | None = None
) -> list[ExperimentSummary]:
    """Summarise the experiments of a file and of the rotated ones beside it.

    Args:
        path: The file that the router writes, or wrote.
        configured: Of each alias with a split: its weights. Of other experiments, and where it's
            not known, the weights that the router noted last.

    Returns:
        By name.

    Raises:
        ConfigError: There is no such file, or it's not ours.
        ResultsUnavailableError: It can't be read now.
    """
    try:
        with closing(sqlite3.connect(":memory:", uri=True, timeout=BUSY_SECONDS)) as connection:
            paths = result_files(path)[:MAX_FILES]
            _attach_all(connection, paths)
            found = [name for (name,) in connection.execute(EXPERIMENTS)]
            known = dict(configured or {})
            return [
                _Experiment(connection, len(paths), name).summary(known.get(name))
                for name in sorted({*found, *known})
            ]
    except (sqlite3.Error, OSError) as exc:
        raise ResultsUnavailableError(
            f"The results in {path} can't be read now.", why=str(exc), path=path
        ) from exc


def _attach_all(connection: sqlite3.Connection, paths: list[Path]) -> None:
    connection.isolation_level = None
    for number, path in enumerate(paths):
        attach(connection, path, f"file{number}")
    answered = " UNION ALL ".join(
        f"SELECT {n} AS file, e.*, o.vote, o.score FROM file{n}.exposures e"  # noqa: S608 - numbers
        f" LEFT JOIN file{n}.outcomes o ON o.exposure = e.id"
        for n in range(len(paths))
    )
    noted = " UNION ALL ".join(
        f"SELECT {n} AS file, s.* FROM file{n}.splits s"  # noqa: S608 - numbers
        for n in range(len(paths))
    )
    connection.execute(f"CREATE TEMP VIEW answered AS {answered}")
    connection.execute(f"CREATE TEMP VIEW noted AS {noted}")
    connection.execute("CREATE TEMP TABLE counted (file, variant, unit, reason, split, n, errors)")
    connection.execute("BEGIN")  # all that follows sees one state of each file


class _Experiment:
    """The queries of one experiment."""

    def __init__(self, connection: sqlite3.Connection, files: int, name: str) -> None:
        self._connection = connection
        self._files = files
        self._name = name

    def summary(self, configured: Mapping[str, float] | None) -> ExperimentSummary:
        self._count()
        splits = self._rows(SPLITS)
        weights = dict(configured or {}) or _weights(splits[0][2] if splits else "")
        not_counted = {
            str(reason): int(count)
            for reason, count in self._connection.execute(REASONS)
            if reason not in ASSIGNED
        }
        changes = sum(
            not _same(_weights(newer), _weights(older))
            for (*_, newer), (*_, older) in itertools.pairwise(splits)
        )
        return summarise(
            self._name,
            self._counts(weights, _since(splits, weights)),
            weights,
            not_counted=not_counted,
            split_changes=changes,
        )

    def _counts(self, weights: Mapping[str, float], since: str) -> list[VariantCounts]:
        totals = {row[0]: row[1:] for row in self._rows(TOTALS)}
        units = dict(self._connection.execute(UNITS % "1").fetchall())
        split_units = dict(self._connection.execute(UNITS % since).fetchall())
        errors = _clusters(self._connection.execute(ERRORS))
        votes = _clusters(self._rows(SUMS % "vote = 'up'"))
        scores = _clusters(self._rows(SUMS % "score"))
        counts = []
        for variant in [*weights, *sorted(totals.keys() - weights.keys())]:
            exposures, prompt_tokens, completion_tokens = totals.get(variant, (0, 0, 0))
            latencies = self._latencies(variant)
            counts.append(
                VariantCounts(
                    variant=variant,
                    exposures=exposures,
                    units=units.get(variant, 0),
                    split_units=split_units.get(variant, 0),
                    errors=errors.get(variant, Clusters()),
                    votes=votes.get(variant, Clusters()),
                    scores=scores.get(variant, Clusters()),
                    ttft_seconds=_known(ttft for ttft, _, _ in latencies),
                    duration_seconds=_known(duration for _, duration, _ in latencies),
                    token_seconds=_known(token for _, _, token in latencies),
                    prompt_tokens=int(prompt_tokens),
                    completion_tokens=int(completion_tokens),
                )
            )
        return counts

    def _latencies(self, variant: str) -> list[tuple[float | None, float | None, float | None]]:
        found: list[tuple[float | None, float | None, float | None]] = []
        for number in range(self._files):
            found += self._rows(LATENCIES % number, variant, LATENCY_ROWS - len(found))
        return found

    def _count(self) -> None:
        self._connection.execute("DELETE FROM counted")
        for number in range(self._files):
            self._connection.execute(COUNT % (number, number), (self._name,))

    def _rows(self, query: str, *more: object) -> list[Any]:
        return self._connection.execute(query, (self._name, *more)).fetchall()


def _clusters(rows: Iterable[Any]) -> dict[str, Clusters]:
    return {row[0]: Clusters(*row[1:]) for row in rows}


def _since(splits: list[tuple[int, int, str]], weights: Mapping[str, float]) -> str:
    """Which exposures were drawn from the split as it is now, as a condition.

    By the order in which splits were noted, newest first: never by the clock.
    """
    if not splits:
        return "1"
    current = []
    for file, row, text in splits:
        if not _same(_weights(text), weights):
            break
        current.append(f"(file = {file:d} AND split = {row:d})")
    return " OR ".join(current) or "0"


def _weights(text: str) -> dict[str, float]:
    return {str(name): float(weight) for name, weight in json.loads(text or "{}").items()}


def _same(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether two splits give each variant the same share."""
    total, other_total = sum(one.values()), sum(other.values())
    return all(
        math.isclose(one.get(name, 0.0) * other_total, other.get(name, 0.0) * total, rel_tol=1e-9)
        for name in {*one, *other}
    )


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
