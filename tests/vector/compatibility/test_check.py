"""vllm_rvec.vector.compatibility.check: a vector against a target on disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.checkpoints import make_checkpoint, tensors
from tests.support.variations import edited_vector, resized, with_tensors, write_tokenizer
from vllm_rvec.errors import CheckpointError, CheckpointNotFoundError
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.compatibility import Report, Verdict, check_target
from vllm_rvec.vector.compatibility.tokenizer import fingerprint

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family


def check(vector: Path, target: Path, vocabulary: str = "strict") -> Report:
    return check_target(VectorReader(vector), target, vocabulary=vocabulary)


def verdicts(report: Report) -> dict[str, str]:
    return {level.name: level.verdict.value for level in report.levels}


def test_the_family_passes(family: Family, vector: Path, tmp_path: Path) -> None:
    """Target and both donors, once there is a tokenizer to compare."""
    write_tokenizer(tmp_path, ["a", "b"])
    tokens = fingerprint(tmp_path)
    assert tokens is not None
    known = edited_vector(vector, tmp_path / "v", tokenizer=tokens)
    for number, target in enumerate((family.target, family.tuned, family.base)):
        copy = shutil.copytree(target, tmp_path / str(number))
        shutil.copy(tmp_path / "tokenizer.json", copy)
        report = check(known, copy)
        assert verdicts(report) == {"structure": "pass", "tokenizer": "pass", "lineage": "pass"}


def test_a_stranger_is_refused_by_its_weights_alone(vector: Path, tmp_path: Path) -> None:
    """Same names, same shapes, another seed."""
    stranger = make_checkpoint(tmp_path / "stranger", seed=5)
    report = check(vector, stranger)
    assert verdicts(report) == {"structure": "pass", "tokenizer": "warn", "lineage": "refuse"}
    assert (report.vector, report.target) == (str(vector), str(stranger))


def test_every_level_refuses_for_itself(vector: Path, tmp_path: Path) -> None:
    """What one level finds does not hide the others."""
    write_tokenizer(tmp_path, [f"token {i}" for i in range(400)])
    tokens = fingerprint(tmp_path)
    assert tokens is not None
    known = edited_vector(vector, tmp_path / "v", tokenizer=tokens)
    stranger = make_checkpoint(tmp_path / "stranger", seed=5, layers=3)
    write_tokenizer(stranger, [f"piece {i}" for i in range(400)])
    report = check(known, stranger)
    assert verdicts(report) == {"structure": "refuse", "tokenizer": "refuse", "lineage": "refuse"}


def test_other_rows_are_refused_or_left_by_policy(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """The lineage does not depend on the vocabulary."""
    target = resized(family.target, tmp_path / "target", 576)
    for policy, verdict in (("strict", "refuse"), ("common", "warn"), ("skip-embeddings", "warn")):
        found = verdicts(check(vector, target, policy))
        assert (found["structure"], found["lineage"]) == (verdict, "pass")


def test_a_quantized_target_is_refused(family: Family, vector: Path, tmp_path: Path) -> None:
    """Nothing can be added to integers; the tensors are named."""
    import torch

    name = "model.layers.0.mlp.up_proj.weight"
    stored = tensors(family.target)
    stored[name] = stored[name].to(torch.int8)
    report = check(vector, with_tensors(family.target, tmp_path / "t", stored))
    assert [line for line in report.lines(Verdict.REFUSE) if name in line]
    assert verdicts(report)["lineage"] == "pass"


def test_a_target_without_the_prefix_passes(family: Family, vector: Path, tmp_path: Path) -> None:
    """Exported as a bare model."""
    bare = {name.removeprefix("model."): t for name, t in tensors(family.target).items()}
    report = check(vector, with_tensors(family.target, tmp_path / "t", bare))
    assert verdicts(report)["structure"] == verdicts(report)["lineage"] == "pass"


def test_a_head_of_its_own_is_a_warning(family: Family, vector: Path, tmp_path: Path) -> None:
    """The donors' is the embedding; the target's configuration says that its own is not."""
    stored = tensors(family.target)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    target = with_tensors(family.target, tmp_path / "t", stored)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    assert verdicts(check(vector, target))["structure"] == "warn"


def test_a_target_that_can_not_be_read_is_an_error(vector: Path, tmp_path: Path) -> None:
    """No verdict is made up for it."""
    with pytest.raises(CheckpointError):
        check(vector, tmp_path)
    with pytest.raises((CheckpointNotFoundError, CheckpointError)):
        check(vector, tmp_path / "none")


def test_no_torch_is_imported(family: Family, vector: Path) -> None:
    """The whole check, in a process of its own."""
    code = (
        "import sys; from pathlib import Path; from vllm_rvec.vector import VectorReader; "
        "from vllm_rvec.vector.compatibility import check_target; "
        "check_target(VectorReader(Path(sys.argv[1])), Path(sys.argv[2])); "
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(vector), str(family.target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
