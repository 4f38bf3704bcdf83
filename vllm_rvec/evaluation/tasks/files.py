"""Files of records, read strictly: JSON lines, JSON, both also gzipped, and Parquet.

Every problem is told with its line; reading goes on behind it, so that all are told at once.
"""

from __future__ import annotations

import gzip
import importlib
import json
import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

from vllm_rvec.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["SUFFIXES", "Fault", "Record", "read_records"]

SUFFIXES: Final = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
"""In the order in which one is preferred to another of the same name."""
MAX_LINE_BYTES: Final = 1 << 20
MAX_FILE_BYTES: Final = 256 << 20
"""Of a JSON file, which is held in memory as a whole."""


@dataclass(frozen=True, slots=True)
class Record:
    """One problem as its file has it."""

    path: Path
    number: int
    """Its line, or its place in the list, from 1 on."""
    values: dict[str, Any]
    is_line: bool = True

    @property
    def where(self) -> str:
        """Words for a message."""
        return f"{'line' if self.is_line else 'example'} {self.number}"

    @property
    def stem(self) -> str:
        """The file's name without its ending."""
        return self.path.name.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong in a file."""

    path: Path
    where: str
    what: str


def read_records(path: Path) -> Iterator[Record | Fault]:
    """Read a file's records, and what is wrong with it, in order.

    Raises:
        ConfigError: It can't be read at all.
    """
    try:
        if path.suffix == ".parquet":
            yield from _of_parquet(path)
        elif ".jsonl" in path.suffixes:
            yield from _of_lines(path)
        else:
            yield from _of_json(path)
    except (OSError, EOFError, zlib.error) as exc:
        raise ConfigError(
            f"the task's file {path} can't be read",
            why=getattr(exc, "strerror", None) or str(exc),
            path=path,
        ) from exc


def _open(path: Path) -> BinaryIO:
    return cast("BinaryIO", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _of_lines(path: Path) -> Iterator[Record | Fault]:
    with _open(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                yield Fault(path, f"line {number}", f"longer than {MAX_LINE_BYTES:,} bytes")
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
            elif line.strip():
                yield _record(path, number, line)


def _record(path: Path, number: int, line: bytes) -> Record | Fault:
    try:
        values = _parsed(line)
    except ValueError as exc:
        return Fault(path, f"line {number}", str(exc))
    if not isinstance(values, dict):
        return Fault(path, f"line {number}", f"a JSON object is expected, not {_kind(values)}")
    return Record(path, number, values)


def _of_json(path: Path) -> Iterator[Record | Fault]:
    """Read a list of objects, also where it stands under `examples`, as in BIG-Bench Hard."""
    with _open(path) as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        yield Fault(path, "the file", f"larger than {MAX_FILE_BYTES:,} bytes")
        return
    try:
        values = _parsed(data)
    except ValueError as exc:
        yield Fault(path, "the file", str(exc))
        return
    listed = values.get("examples") if isinstance(values, dict) else values
    if not isinstance(listed, list):
        yield Fault(path, "the file", "a list is expected, or an object with one under `examples`")
        return
    for number, one in enumerate(listed, 1):
        if isinstance(one, dict):
            yield Record(path, number, one, is_line=False)
        else:
            what = f"a JSON object is expected, not {_kind(one)}"
            yield Fault(path, f"example {number}", what)


def _of_parquet(path: Path) -> Iterator[Record]:
    try:
        # pyarrow has no types of its own, and is here only where somebody wants it.
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as exc:
        raise ConfigError(
            f"{path.name} is stored as Parquet, and pyarrow is not installed",
            fix="install vllm-rvec[parquet], or give the benchmark's own JSON file as `path`",
            path=path,
        ) from exc
    try:
        rows = parquet.read_table(path).to_pylist()
    except ValueError as exc:  # what pyarrow raises is one
        raise ConfigError(f"the task's file {path} can't be read", why=str(exc), path=path) from exc
    for number, values in enumerate(rows, 1):
        yield Record(path, number, values, is_line=False)


def _parsed(data: bytes) -> Any:
    """Parse JSON: UTF-8, no key twice, numbers that are numbers.

    Raises:
        ValueError: It isn't, in words that quote nothing.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        msg = f"not UTF-8, from byte {exc.start + 1} on"
        raise ValueError(msg) from exc
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_no_number
        )
    except json.JSONDecodeError as exc:
        msg = f"not JSON: {exc.msg}, at character {exc.pos + 1}"
        raise ValueError(msg) from exc
    except RecursionError as exc:
        msg = "not JSON that can be read: nested too deep"
        raise ValueError(msg) from exc


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        msg = f"`{next(n for n in names if names.count(n) > 1)}` is given twice"
        raise ValueError(msg)
    return values


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        msg = "a number is too large"
        raise ValueError(msg)
    return value


def _no_number(name: str) -> None:
    msg = f"{name} is no number in JSON"
    raise ValueError(msg)


def _kind(value: object) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", int: "a number"}
    return "null" if value is None else kinds.get(type(value), "a number")
