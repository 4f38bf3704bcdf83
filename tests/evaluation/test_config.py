"""vllm_rvec.evaluation.config: the file and the flags of a sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import yaml

from vllm_rvec.errors import ConfigError
from vllm_rvec.evaluation.config import KEY_VARIABLE, SweepConfig, load_sweep_config
from vllm_rvec.evaluation.records import ArmKind

if TYPE_CHECKING:
    from pathlib import Path


def written(folder: Path, **values: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "vector": "v", "tasks": ["t.jsonl"]} | values))
    return path


def test_flags_go_before_the_file(tmp_path: Path) -> None:
    """And what is not given there stays."""
    path = written(tmp_path, seed=3, alphas="0:1:0.5", limit=5)
    config = load_sweep_config(path, {"limit": 7, "alphas": None, "tasks": ["u.jsonl"]})
    assert (config.seed, config.limit, config.alphas) == (3, 7, (0.0, 0.5, 1.0))
    assert [task.path for task in config.tasks] == ["u.jsonl"]
    assert config.arms == tuple(ArmKind)


def test_relative_paths_are_the_files(tmp_path: Path) -> None:
    """Where they exist there; else they are ids of the Hub. The output always is."""
    for name in ("m", "t.jsonl", "shots.jsonl"):
        (tmp_path / name).touch()
    shots = {"path": "t.jsonl", "name": "u", "few_shot": {"path": "shots.jsonl"}}
    path = written(tmp_path, tasks=["t.jsonl", "owner/data", shots], output="out")
    config = load_sweep_config(path, {})
    assert config.model == str(tmp_path / "m")
    assert config.vector == "v"
    assert [task.path for task in config.tasks] == [
        *(str(tmp_path / "t.jsonl"), "owner/data", str(tmp_path / "t.jsonl")),
    ]
    assert config.tasks[2].few_shot is not None
    assert config.tasks[2].few_shot.path == str(tmp_path / "shots.jsonl")
    assert config.folder == tmp_path / "out"


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    """Of file and flags."""
    with pytest.raises(ConfigError) as refused:
        load_sweep_config(written(tmp_path, modle="x", retries=-1), {"max_concurrency": 0})
    assert sorted(refused.value.problems) == [
        "`max_concurrency`: should be greater than or equal to 1 (from the command line)",
        "`modle` is not a setting; did you mean `model`?",
        "`retries`: should be greater than or equal to 0",
    ]


def test_the_engines_environment_is_not_written_down(tmp_path: Path) -> None:
    """It may hold secrets."""
    config = load_sweep_config(written(tmp_path, env={"HF_TOKEN": "secret", "N": 1}), {})
    assert config.env == {"HF_TOKEN": "secret", "N": "1"}
    assert "secret" not in config.model_dump_json(by_alias=True)
    assert "secret" not in repr(config)


def test_what_is_written_down_reads_back(tmp_path: Path) -> None:
    """So that a report can be made again from the folder."""
    config = load_sweep_config(written(tmp_path, engine={"dtype": "float32"}, alphas="0:1:0.1"), {})
    plain = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    assert SweepConfig.model_validate(plain) == config


def test_the_key_is_looked_for_where_it_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the usual place without an error where there is none."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    usual = load_sweep_config(written(tmp_path), {})
    assert usual.api_key() is None
    monkeypatch.setenv(KEY_VARIABLE, "k")
    assert usual.api_key() == "k"
    named = load_sweep_config(written(tmp_path, api_key_env="OTHER_KEY"), {})
    with pytest.raises(ConfigError, match="OTHER_KEY is not set"):
        named.api_key()
    monkeypatch.setenv("OTHER_KEY", "k\n")
    with pytest.raises(ConfigError, match="one line of plain text") as refused:
        named.api_key()
    assert "k\n" not in str(refused.value)
