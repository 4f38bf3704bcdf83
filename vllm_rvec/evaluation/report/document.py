"""A sweep's results as JSON: the report for machines. SCHEMA.md says what each key means."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum

from vllm_rvec.evaluation.results import SweepResults

__all__ = ["SCHEMA", "SCHEMA_VERSION", "as_document", "as_json"]

SCHEMA = "vllm-rvec/sweep-report"

SCHEMA_VERSION = 1
"""Goes up when a key changes its meaning or goes; a new key doesn't change it."""


def as_document(results: SweepResults) -> dict[str, object]:
    """The results as plain dicts and lists: no NaN, null for what can't be calculated."""
    document: dict[str, object] = {"schema": SCHEMA, "version": SCHEMA_VERSION}
    document["verdict"] = _plain(results.verdict)
    for field in fields(SweepResults):
        document.setdefault(field.name, _plain(getattr(results, field.name)))
    return document


def as_json(results: SweepResults) -> str:
    """The results as a JSON text, the same each time."""
    return json.dumps(as_document(results), indent=2, allow_nan=False) + "\n"


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
