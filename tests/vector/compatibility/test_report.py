"""vllm_rvec.vector.compatibility.report: verdicts, evidence, refusal."""

from __future__ import annotations

import json

import pytest

from vllm_rvec.errors import IncompatibleVectorError
from vllm_rvec.vector.compatibility import Level, Report, Verdict
from vllm_rvec.vector.compatibility.report import passed, refused, warned, worst


def report(*levels: Level) -> Report:
    return Report("v", "t", levels)


STRUCTURE = Level("structure", "9 tensors don't match", tuple(refused(f"w{i}") for i in range(9)))
TOKENIZER = Level("tokenizer", "3 ids differ", (warned("id 7"), passed("the rest")), {"n": 3})
LINEAGE = Level("lineage", "far", (refused("another initialisation"),))


def test_the_worst_finding_is_the_verdict() -> None:
    """Of a level and of the whole; without evidence it is pass."""
    assert [STRUCTURE.verdict, TOKENIZER.verdict] == [Verdict.REFUSE, Verdict.WARN]
    assert report(TOKENIZER).verdict is Verdict.WARN
    assert report(TOKENIZER, LINEAGE).verdict is Verdict.REFUSE
    assert report().verdict is worst([]) is Verdict.PASS


def test_a_refusal_raises_with_all_its_evidence() -> None:
    """Every level is in the first line, and its first evidence among the lines shown."""
    with pytest.raises(IncompatibleVectorError) as caught:
        report(STRUCTURE, TOKENIZER, LINEAGE).raise_if_refused()
    assert caught.value.what == (
        "the vector does not belong to t: lineage: far; structure: 9 tensors don't match"
    )
    assert len(caught.value.problems) == 10
    assert "another initialisation" in str(caught.value)
    assert "... and 2 more" in str(caught.value)
    assert "vllm-rvec check v --target t" in caught.value.fix


def test_force_and_warnings_do_not_raise() -> None:
    """Who goes on can still list what was refused, level by level."""
    found = report(STRUCTURE, TOKENIZER, LINEAGE)
    found.raise_if_refused(force=True)
    report(TOKENIZER).raise_if_refused()
    assert list(found.lines(Verdict.REFUSE))[-1] == "lineage: another initialisation"
    assert list(found.lines(Verdict.WARN)) == ["tokenizer: id 7"]


def test_json_has_verdicts_evidence_and_numbers() -> None:
    """Plain values, as `check --json` prints them."""
    found = json.loads(json.dumps(report(TOKENIZER).as_json()))
    assert found == {
        "vector": "v",
        "target": "t",
        "verdict": "warn",
        "levels": [
            {
                "name": "tokenizer",
                "verdict": "warn",
                "summary": "3 ids differ",
                "findings": [
                    {"verdict": "warn", "text": "id 7"},
                    {"verdict": "pass", "text": "the rest"},
                ],
                "n": 3,
            }
        ],
    }


def test_names_from_files_can_neither_move_a_cursor_nor_forge_a_line() -> None:
    """Control characters are escaped; other alphabets stay."""
    assert refused("a\nrvec error: \x1b[2J\u202e模型").text == (r"a\nrvec error: \x1b[2J\u202e模型")


def test_what_can_not_be_forced_raises_alone() -> None:
    """With its own reason and way out; the noise of other levels is left out."""
    final = Level("quantization", "codes", (refused("w: a code"),), why="no sum", fix="ways out")
    with pytest.raises(IncompatibleVectorError) as caught:
        report(STRUCTURE, final, LINEAGE).raise_if_refused(force=True)
    assert caught.value.problems == ("w: a code",)
    assert (caught.value.what, caught.value.why, caught.value.fix) == (
        "the vector can't be added to t: codes",
        "no sum",
        "ways out",
    )
