"""vllm_rvec.vector.extract: v = tuned - base, whole or not at all."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from tests.support.checkpoints import make_checkpoint, tensors
from vllm_rvec.arithmetic import difference
from vllm_rvec.errors import CheckpointError, ConfigError
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.extract import extract

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family


def test_base_plus_vector_is_the_tuned_donor_bit_for_bit(family: Family, vector: Path) -> None:
    """A float32 vector of two bf16 donors loses nothing."""
    tuned, base, v = tensors(family.tuned), tensors(family.base), tensors(vector)
    assert set(v) == set(tuned)
    for name in tuned:
        assert torch.equal((base[name].float() + v[name]).bfloat16(), tuned[name])


def test_a_bf16_vector_is_the_difference_rounded_once(vector: Path, vector_bf16: Path) -> None:
    """Half the size, and what is lost is one rounding of v."""
    exact, rounded = tensors(vector), tensors(vector_bf16)
    for name in exact:
        assert torch.equal(rounded[name], exact[name].bfloat16())


def test_the_manifest_names_every_tensor_of_the_donors(family: Family, vector: Path) -> None:
    """Coverage can be checked against it."""
    manifest = VectorReader(vector).manifest
    assert set(manifest.tensors) == set(tensors(family.tuned))
    assert manifest.model_type == "qwen2"
    assert manifest.architecture == "Qwen2ForCausalLM"
    assert manifest.tie_word_embeddings
    assert manifest.donors.tuned.name == "tuned"


def test_equal_donors_store_nothing(family: Family, tmp_path: Path) -> None:
    """Tensors without a difference are named in the manifest only."""
    made = extract(family.base, family.base, tmp_path / "v")
    assert (made.changed_elements, made.norm) == (0, 0.0)
    assert made.zero_tensors == made.tensors > 0
    vector = VectorReader(tmp_path / "v")
    assert all(vector.tensor(name) is None for name in vector.manifest.tensors)


def test_shards_follow_the_tuned_donor(family: Family, tmp_path: Path) -> None:
    """A donor in two shards gives a vector in two shards, with all tensors."""
    sharded = tmp_path / "sharded"
    shutil.copytree(family.tuned, sharded)
    whole = tensors(sharded)
    (sharded / "model.safetensors").unlink()
    names = sorted(whole)
    for number, part in enumerate((names[:5], names[5:]), start=1):
        save_file({n: whole[n] for n in part}, sharded / f"model-{number}.safetensors")
    extract(sharded, family.base, tmp_path / "v")
    vector = VectorReader(tmp_path / "v")
    assert [path.name for path in vector.shards] == [
        "vector-00001-of-00002.safetensors",
        "vector-00002-of-00002.safetensors",
    ]
    assert set(vector.table) == set(whole)


def test_integer_tensors_must_be_equal(family: Family, tmp_path: Path) -> None:
    """Buffers of integers are covered as zero; where they differ there is no vector."""
    donors = []
    for number, value in enumerate((1, 2)):
        folder = tmp_path / str(number)
        shutil.copytree(family.base, folder)
        positions = {"positions": torch.full((3,), value)}
        save_file(tensors(folder) | positions, folder / "model.safetensors")
        donors.append(folder)
    extract(donors[0], donors[0], tmp_path / "same")
    assert VectorReader(tmp_path / "same").manifest.tensors["positions"].encoding == "zero"
    with pytest.raises(CheckpointError, match="differs between the donors"):
        extract(donors[0], donors[1], tmp_path / "other")


def test_all_mismatches_are_named_at_once(family: Family, tmp_path: Path) -> None:
    """Missing, extra and misshapen tensors in one error."""
    folder = tmp_path / "odd"
    shutil.copytree(family.base, folder)
    odd = tensors(folder)
    odd.pop("model.norm.weight")
    odd["extra.weight"] = torch.zeros(1)
    odd["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(odd, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        extract(family.tuned, folder, tmp_path / "v")
    assert len(caught.value.problems) == 3
    assert not (tmp_path / "v").exists()


def test_nan_in_a_donor_leaves_nothing_behind(family: Family, tmp_path: Path) -> None:
    """The error names the tensor, and neither a vector nor a fragment stays."""
    folder = tmp_path / "donor"
    shutil.copytree(family.tuned, folder)
    spoilt = tensors(folder)
    spoilt["model.norm.weight"][3] = float("nan")
    save_file(spoilt, folder / "model.safetensors")
    output = tmp_path / "out" / "v"
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*not finite"):
        extract(folder, family.base, output)
    assert list(output.parent.iterdir()) == []


def test_an_interrupt_leaves_nothing_behind(family: Family, tmp_path: Path) -> None:
    """Ctrl-C half-way: no folder that reads as a vector."""
    output = tmp_path / "out" / "v"

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(family.tuned, family.base, output, on_progress=interrupt)
    assert list(output.parent.iterdir()) == []


def test_an_existing_output_is_never_overwritten(family: Family, tmp_path: Path) -> None:
    """Vectors are kept for years."""
    (tmp_path / "v").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        extract(family.tuned, family.base, tmp_path / "v")


def test_donors_of_two_model_types_are_refused(family: Family, tmp_path: Path) -> None:
    """Equal names and shapes are not enough."""
    other = make_checkpoint(tmp_path / "other", seed=3)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="model type: qwen2 tuned, llama base"):
        extract(family.tuned, other, tmp_path / "v")


def test_an_unknown_dtype_is_refused(family: Family, tmp_path: Path) -> None:
    """The message lists the choices."""
    with pytest.raises(ConfigError, match="float32, bfloat16, float16"):
        extract(family.tuned, family.base, tmp_path / "v", dtype="int8")


@pytest.mark.parametrize("output", ["/proc/x/y", "file/below", "x" * 300])
def test_an_output_that_can_not_be_written_is_a_clear_error(
    family: Family, tmp_path: Path, output: str
) -> None:
    """With the system's reason, and no traceback."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="can't be written"):
        extract(family.tuned, family.base, tmp_path / output)


def test_donors_that_leave_keys_out_are_understood(family: Family, tmp_path: Path) -> None:
    """No architectures, nothing said of tying: a donor without a head of its own is tied."""
    for name, donor in (("tuned", family.tuned), ("base", family.base)):
        shutil.copytree(donor, tmp_path / name)
        (tmp_path / name / "config.json").write_text('{"model_type": "qwen2", "architectures": []}')
    extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "v")
    manifest = VectorReader(tmp_path / "v").manifest
    assert manifest.tie_word_embeddings
    assert manifest.architecture == ""


def test_where_a_float32_vector_is_not_exact() -> None:
    """Donors more than about 16 powers of two apart, and signs of zero, don't come back."""
    base = torch.tensor([1.0, 0.0]).bfloat16()
    tuned = torch.tensor([1e-6, -0.0]).bfloat16()
    back = (base.float() + difference(tuned, base)).bfloat16()
    assert not torch.equal(back.view(torch.int16), tuned.view(torch.int16))
    assert back[0].item() == pytest.approx(tuned[0].item(), rel=0.05)
