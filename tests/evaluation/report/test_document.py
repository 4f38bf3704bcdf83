"""vllm_rvec.evaluation.report.document: the report for machines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tests.evaluation.simulation import BASE, Truth, sweep
from vllm_rvec.evaluation import cautions, report
from vllm_rvec.evaluation.report import as_document, as_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_rvec.evaluation.results import SweepResults

SCHEMA = Path(report.__file__).with_name("SCHEMA.md").read_text()


def keys_of(value: object, depth: int = 0) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            if key not in {"facts", "alphas"}:
                yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value[:20]:
            yield from keys_of(inner)


def test_the_document_says_what_it_is(results: SweepResults) -> None:
    """Schema, version, verdict: at the top, in this order, and the rest behind."""
    document = json.loads(as_json(results))
    assert list(document)[:3] == ["schema", "version", "verdict"]
    assert (document["schema"], document["version"]) == ("vllm-rvec/sweep-report", 1)
    assert document["verdict"]["code"] == results.verdict.code
    assert document["facts"] == {"seed": 5}
    assert document["arms"][1]["kind"] == "base+prompt"


def test_every_key_is_documented(results: SweepResults) -> None:
    """And nothing is documented that isn't there."""
    documented = set(re.findall(r"`([a-z_0-9]+)`", SCHEMA.split("Codes of warnings")[0]))
    found = set(keys_of(as_document(results))) - {"low", "high", "value"}
    assert found <= documented
    assert set(as_document(results)) <= set(re.findall(r"`([a-z_]+)`", SCHEMA))


def test_every_warning_is_documented() -> None:
    """The codes that `cautions` gives are those that the schema lists."""
    source = Path(cautions.__file__).read_text()
    listed = set(re.findall(r"`([a-z_]+)`", SCHEMA.split("Codes of warnings")[1]))
    assert listed == {code for code in listed if f'"{code}"' in source}
    given = re.findall(r'Finding\(\s*"([a-z_]+)"', source)
    given += re.findall(r'\("(collapse_[a-z_]+)"', source)
    given += re.findall(r'"(loss_on_[a-z]+)"', source)
    assert set(given) == listed


def test_no_number_is_not_a_number() -> None:
    """What can't be calculated is null: JSON has no NaN, and facts may hold one."""
    empty = sweep(1, [], {BASE: Truth()})
    assert "NaN" not in as_json(empty)
    assert as_document(empty)["confirmations"] == []


def test_hostile_texts_stay_what_they_are(hostile: SweepResults) -> None:
    """JSON escapes them; a reader gets them back, lone surrogate and all, from plain ASCII."""
    text = as_json(hostile)
    assert text.isascii()
    assert json.loads(text)["tasks"][0]["name"] == hostile.tasks[0].name
