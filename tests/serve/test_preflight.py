"""vllm_rvec.serve.preflight: what is wrong is known before an engine starts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.checkpoints import make_checkpoint
from tests.support.quantized import quantized_copy
from tests.support.variations import resized
from vllm_rvec.errors import (
    CheckpointNotFoundError,
    IncompatibleVectorError,
    VectorCorruptError,
    VectorNotFoundError,
)
from vllm_rvec.serve import ServeConfig
from vllm_rvec.serve.preflight import check_files
from vllm_rvec.vector.compatibility import Verdict

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family


def config(model: Path | str, vector: Path, **settings: object) -> ServeConfig:
    return ServeConfig.model_validate({"model": str(model), "vector": str(vector), **settings})


def test_a_target_of_the_family_is_reported_on(family: Family, vector: Path) -> None:
    """The report comes back, with its warnings, and the vector's folder for the engines."""
    found = check_files(config(family.target, vector))
    (report,) = found.reports
    assert report.verdict is Verdict.WARN  # the family has no tokenizer
    assert len(list(report.lines(Verdict.WARN))) == 1


def test_the_vector_is_verified_once(family: Family, vector: Path, tmp_path: Path) -> None:
    """With progress at first; a second start remembers, a damaged copy is refused."""
    copy = shutil.copytree(vector, tmp_path / "v")
    seen: list[tuple[int, int]] = []
    for expected in (True, False):
        seen.clear()
        check_files(config(family.target, copy), on_progress=lambda *done: seen.append(done))
        assert bool(seen) is expected
    shard = copy / "vector.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(VectorCorruptError, match=r"vector\.safetensors"):
        check_files(config(family.target, copy))


def test_a_stranger_is_refused_unless_forced(vector: Path, tmp_path: Path) -> None:
    """With force the refusal is in the report."""
    stranger = make_checkpoint(tmp_path / "stranger", seed=5)
    with pytest.raises(IncompatibleVectorError, match="lineage: relative distance"):
        check_files(config(stranger, vector))
    forced = check_files(config(stranger, vector, force=True))
    (report,) = forced.reports
    assert report.verdict is Verdict.REFUSE


def test_the_policy_is_the_configurations(family: Family, vector: Path, tmp_path: Path) -> None:
    """Other rows pass under `common` only."""
    target = resized(family.target, tmp_path / "t", 576)
    with pytest.raises(IncompatibleVectorError, match="1 tensors don't match"):
        check_files(config(target, vector))
    assert check_files(config(target, vector, vocabulary="common")).reports


def test_a_target_on_the_hub_is_left_to_vllm(vector: Path) -> None:
    """It is not fetched to be checked: the loader does that."""
    assert check_files(config("owner/name", vector)).reports == ()


@pytest.mark.parametrize("model", ["/nowhere", "./nowhere", "a/b/c", "nowhere"])
def test_a_target_that_is_a_path_to_nothing_is_named(vector: Path, model: str) -> None:
    """Only owner/name can be an id on the Hub."""
    with pytest.raises(CheckpointNotFoundError, match=f"there is no target {model}"):
        check_files(config(model, vector))


def test_a_missing_vector_is_named(family: Family, tmp_path: Path) -> None:
    """Before anything is read of the target."""
    with pytest.raises(VectorNotFoundError):
        check_files(config(family.target, tmp_path / "none"))


def test_no_torch_is_needed(family: Family, vector: Path) -> None:
    """The whole of it, verification too, in a process of its own."""
    code = (
        "import sys; from vllm_rvec.serve import ServeConfig; "
        "from vllm_rvec.serve.preflight import check_files; "
        "check_files(ServeConfig(model=sys.argv[1], vector=sys.argv[2])); "
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(family.target), str(vector)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_quantized_target_is_refused_even_if_forced(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """Half a minute before an engine would say so."""
    target = quantized_copy(family.target, tmp_path / "target", "gptq")
    for force in (False, True):
        with pytest.raises(IncompatibleVectorError, match=r"the target is quantized \(gptq\)"):
            check_files(config(target, vector, force=force))


def test_a_dial_may_have_a_quantized_target(family: Family, vector: Path, tmp_path: Path) -> None:
    """The vector stays beside the codes."""
    target = quantized_copy(family.target, tmp_path / "target", "gptq")
    config = ServeConfig(model=str(target), vector=str(vector))
    (report,) = check_files(config, "dial").reports
    assert "the vector is beside it" in report.levels[0].summary
