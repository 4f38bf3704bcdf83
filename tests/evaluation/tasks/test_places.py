"""Tasks from the Hub: which files are taken, what the cache does, and how refusals read."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.evaluation.tasks.conftest import BBH, GSM8K
from vllm_rvec.errors import ConfigError
from vllm_rvec.evaluation.tasks import TaskSpec, is_elsewhere, load_task, places

if TYPE_CHECKING:
    from pathlib import Path

    from tests.evaluation.tasks.conftest import Write
    from vllm_rvec.evaluation.records import Task

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def load(**spec: Any) -> Task:
    return load_task(TaskSpec.model_validate(spec))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset's folder as the client's cache has it, and the client's answer."""
    folder = tmp_path / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    asked: list[dict[str, Any]] = []

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.append({"repo": repo, **options})
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(places, "asked", asked, raising=False)
    return folder


def put(path: Path, records: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_split_and_subset_choose_files(hub: Path) -> None:
    """Of a dataset, files of the subset's folder with the split in their name; all shards of it."""
    put(hub / "main" / "test-00000-of-00002.jsonl", GSM8K[:1])
    put(hub / "main" / "test-00001-of-00002.jsonl", [{**GSM8K[1], "question": "other"}])
    put(hub / "socratic" / "test-00000-of-00001.jsonl", GSM8K)
    put(hub / "main" / "train-00000-of-00001.jsonl", GSM8K)
    put(hub / "main" / "latest.jsonl", GSM8K)
    task = load(dataset="openai/gsm8k", subset="main", format="gsm8k")
    ids = [problem.id for problem in task.problems]
    assert ids == ["test-00000-of-00002/1", "test-00001-of-00002/1"]
    assert task.source == f"openai/gsm8k@{COMMIT}"
    assert load(path="openai/gsm8k", subset="socratic", format="gsm8k").problems != task.problems


def test_a_file_can_be_named(hub: Path) -> None:
    """Whatever its split."""
    put(hub / "data" / "all.jsonl", GSM8K)
    assert len(load(dataset="a/b", file="data/all.jsonl", format="gsm8k").problems) == 3


def test_the_revision_is_asked_for(hub: Path) -> None:
    """Behind an @ or by itself."""
    put(hub / "test.jsonl", GSM8K)
    load(dataset="a/b@v1", format="gsm8k")
    load(dataset="a/b", revision="v2", format="gsm8k")
    asked = places.asked  # type: ignore[attr-defined]
    assert [one["revision"] for one in asked] == ["v1", "v2"]
    assert {one["repo_type"] for one in asked} == {"dataset"}


def test_subtasks_are_folders_on_the_hub(hub: Path) -> None:
    """Where files are called after the split, the folder is the family."""
    put(hub / "navigate" / "test-00000-of-00001.jsonl", BBH)
    put(hub / "web_of_lies" / "test-00000-of-00001.jsonl", BBH)
    task = load(dataset="lukaemon/bbh", format="bbh")
    assert {problem.family for problem in task.problems} == {"navigate", "web_of_lies"}
    assert len(load(dataset="lukaemon/bbh", subset="navigate", format="bbh").problems) == 2


def test_a_dataset_without_such_files_is_told(hub: Path) -> None:
    """With what was looked for."""
    put(hub / "train.jsonl", GSM8K)
    with pytest.raises(ConfigError, match="none in a folder main has `test` in its name"):
        load(dataset="a/b", subset="main", format="gsm8k")


def test_offline_is_told() -> None:
    """HF_HUB_OFFLINE is honoured, and said."""
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        load(dataset="owner/not-in-the-cache", format="gsm8k")


@pytest.mark.parametrize(
    ("written", "elsewhere"),
    [
        ({"dataset": "owner/name"}, True),
        ({"path": "owner/name"}, True),
        ({"path": "."}, False),
        ({"path": "not/here.jsonl/at all"}, False),
        ({"path": "~nobody-is-called-so/a.jsonl"}, False),
    ],
)
def test_a_path_is_elsewhere_where_only_the_hub_could_have_it(
    written: dict[str, str], elsewhere: bool
) -> None:
    """A user who isn't there is no traceback's business."""
    assert is_elsewhere(TaskSpec.model_validate(written)) is elsewhere


def test_plain_files_go_before_parquet(write: Write, tmp_path: Path) -> None:
    """Of two that differ in their ending alone."""
    path = write("bbh/navigate.jsonl", BBH)
    (path.parent / "navigate.parquet").write_bytes(b"PAR1")
    (path.parent / "README.md").write_text("none")
    assert len(load(path=str(path.parent), format="bbh").problems) == 2


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read where pyarrow is installed, and told where it isn't."""
    path = tmp_path / "test.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"install vllm-rvec\[parquet\]"):
        load(path=str(path), format="gsm8k")
    # As much of pyarrow as is called; the real one is in no lock of ours.
    parquet = ModuleType("pyarrow.parquet")
    table = SimpleNamespace(to_pylist=lambda: GSM8K)
    parquet.read_table = lambda _: table  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    assert len(load(path=str(path), format="gsm8k").problems) == 3

    def read_broken(_: Path) -> None:
        raise ValueError("Parquet magic bytes not found in footer.")  # as pyarrow's ArrowInvalid

    parquet.read_table = read_broken  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="magic bytes not found"):
        load(path=str(path), format="gsm8k")
