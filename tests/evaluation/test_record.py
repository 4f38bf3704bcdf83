"""vllm_rvec.evaluation.record: which sweep goes on, and which is another one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from vllm_rvec.errors import ConfigError
from vllm_rvec.evaluation.record import (
    RECORD_NAME,
    ArmRecord,
    Run,
    SweepRecord,
    TaskRecord,
    read_record,
)
from vllm_rvec.evaluation.records import Arm, ArmKind, Task

if TYPE_CHECKING:
    from pathlib import Path

BASE = ArmRecord.of(Arm("base", ArmKind.BASE, 0.0, "base"))
HALF = ArmRecord.of(Arm("v@0.5", ArmKind.VECTOR, 0.5, "base", 0.5))
TASK = TaskRecord.of(Task("sums", (), "exact", digest="a"))


def record(**changed: Any) -> SweepRecord:
    values: dict[str, Any] = {
        "how": "dial",
        "target": "target",
        "target_digest": "t",
        "vector": "vector",
        "vector_digest": "v",
        "random_seed": None,
        "seed": 0,
        "temperature": 0.0,
        "engine": {"max-model-len": 256, "dtype": "float32"},
        "tasks": {"sums": TASK},
        "arms": (BASE,),
        "missing": {},
        "config": {},
        "runs": (Run.now(command="", versions={}, endpoint=None),),
    }
    return SweepRecord(**{**values, **changed})


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    """And replaces an earlier one."""
    record(seed=1).write(tmp_path)
    written = record()
    written.write(tmp_path)
    assert read_record(tmp_path) == written
    assert [path.name for path in tmp_path.iterdir()] == [RECORD_NAME]


def test_a_folder_without_one_has_none(tmp_path: Path) -> None:
    """Not an error: a sweep begins there."""
    assert read_record(tmp_path) is None


def test_a_file_that_is_something_else_is_refused(tmp_path: Path) -> None:
    """Never overwritten."""
    (tmp_path / RECORD_NAME).write_text('{"format": 2}')
    with pytest.raises(ConfigError, match="is not a sweep's record"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"arms": (BASE, HALF), "random_seed": 3},
        {"tasks": {"sums": TASK, "more": TASK}},
        {"target": "another/path"},
        {"config": {"max_concurrency": 1}},
        {"engine": {"max_model_len": 512, "--dtype": "float32"}},
        {"engine": {"--": ["--max_num_seqs", "8", "--dtype=float32"]}},
        {"arms": ()},
        {"arms": (BASE.model_copy(update={"model": "other"}),)},
    ],
)
def test_more_of_the_same_goes_on(changed: dict[str, Any]) -> None:
    """More arms, tasks, room; and what only decides how fast it goes. Runs are added."""
    kept = record()
    going_on = record(**changed).continuing(kept)
    assert going_on.runs[:-1] == kept.runs
    assert len(going_on.runs) == 2


def test_what_an_earlier_run_asked_is_not_forgotten(tmp_path: Path) -> None:
    """Its answers are in the folder: a run without it must not let a third ask it otherwise."""
    fewer = record().continuing(
        record(arms=(BASE, HALF), tasks={"sums": TASK, "more": TASK}, random_seed=1)
    )
    fewer.write(tmp_path)
    third = record(
        arms=(BASE, HALF.model_copy(update={"alpha": 0.4})),
        tasks={"more": TASK.model_copy(update={"digest": "b"})},
        random_seed=2,
    )
    kept = read_record(tmp_path)
    assert kept is not None
    assert third.clashes(kept) == [
        "random seed: 1 there, 2 now",
        "task more: another digest",
        "arm v@0.5: another alpha",
    ]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"how": "endpoint"}, "how: dial there, endpoint now"),
        ({"target_digest": "u"}, "target digest: t there, u now"),
        ({"vector_digest": "w"}, "vector digest: v there, w now"),
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"temperature": 0.7}, "temperature: 0.0 there, 0.7 now"),
        ({"engine": {}}, "vLLM's --dtype: float32 there, None now"),
        (
            {"engine": {"dtype": "float32", "--": ["--max-num-seqs=8", "-tp", "2"]}},
            "vLLM's --tp: None there, 2 now",
        ),
        (
            {"engine": {"dtype": "float32", "--": ["--seed", "-1"]}},
            "vLLM's --seed: None there, -1 now",
        ),
        ({"config": {"vocabulary": "common"}}, "vocabulary: strict there, common now"),
        (
            {"tasks": {"sums": TaskRecord.of(Task("sums", (), "exact", digest="b"))}},
            "task sums: another digest",
        ),
        (
            {"tasks": {"sums": TASK.model_copy(update={"max_tokens": 9, "source": "moved"})}},
            "task sums: another max tokens",
        ),
        ({"arms": (BASE.model_copy(update={"alpha": 0.1}),)}, "arm base: another alpha"),
    ],
)
def test_another_sweep_is_refused(changed: dict[str, Any], problem: str) -> None:
    """With what differs, so that no two kinds of answers are mixed."""
    with pytest.raises(ConfigError, match="the answers of another sweep") as refused:
        record(**changed).continuing(record())
    assert problem in refused.value.problems
    assert len(refused.value.problems) == 1


def test_another_random_vector_is_another_sweep() -> None:
    """Once there was one."""
    with pytest.raises(ConfigError, match="random seed: 1 there, 2 now"):
        record(random_seed=2).continuing(record(random_seed=1))


def test_a_target_that_is_elsewhere_goes_by_its_name() -> None:
    """There is no digest of it."""
    kept = record(target_digest=None)
    assert record(target_digest=None).clashes(kept) == []
    assert record(target_digest=None, target="b").clashes(kept) == ["target: target there, b now"]
