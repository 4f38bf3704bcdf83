"""vllm_rvec.vector.extract: v = tuned - base, whole or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import blake3
import pytest
import torch
from safetensors.torch import save_file

from tests.support.checkpoints import make_checkpoint, make_family, tensors
from vllm_rvec.arithmetic import difference
from vllm_rvec.checkpoint.fetch import Located
from vllm_rvec.checkpoint.writer import ShardWriter
from vllm_rvec.errors import CheckpointError, ConfigError, VectorFormatError
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.extract import STORED_DTYPES, extract

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

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
    assert manifest.donors.tuned.id == "tuned"


def test_equal_donors_store_nothing(family: Family, tmp_path: Path) -> None:
    """Tensors without a difference are named in the manifest only."""
    made = extract(family.base, family.base, tmp_path / "v")
    assert (made.changed_elements, made.norm) == (0, 0.0)
    assert {entry.encoding for entry in made.manifest.tensors.values()} == {"zero"}
    vector = VectorReader(tmp_path / "v")
    assert all(vector.tensor(name) is None for name in vector.manifest.tensors)


def split(folder: Path, parts: int) -> None:
    """Spread a single-file checkpoint over shards, in an order that is not the file's."""
    whole = tensors(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(whole, reverse=True)
    for number in range(parts):
        mine = {n: whole[n] for n in names[number::parts]}
        save_file(mine, folder / f"model-{number}.safetensors")


def rewrite(donor: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Copy a donor with other tensors."""
    shutil.copytree(donor, folder)
    found = tensors(folder)
    change(found)
    save_file(found, folder / "model.safetensors")
    return folder


def assert_same_vector(one: Path, other: Path) -> None:
    first, second = VectorReader(one), VectorReader(other)
    assert first.manifest.tensors == second.manifest.tensors
    for name in first.manifest.tensors:
        one_side, other_side = first.tensor(name), second.tensor(name)
        if one_side is None or other_side is None:
            assert one_side is other_side
        else:
            assert torch.equal(one_side, other_side)


def test_donors_in_other_shards_give_the_same_vector(family: Family, tmp_path: Path) -> None:
    """How tensors are spread over files is nothing of the vector's."""
    for name, donor, parts in (("tuned", family.tuned, 3), ("base", family.base, 2)):
        shutil.copytree(donor, tmp_path / name)
        split(tmp_path / name, parts)
    extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "sharded")
    extract(family.tuned, family.base, tmp_path / "whole")
    assert_same_vector(tmp_path / "sharded", tmp_path / "whole")


def test_a_large_vector_is_spread_over_shards(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named as the Hub names them, each tensor in one, all of them in the manifest."""
    monkeypatch.setattr("vllm_rvec.vector.writer.MAX_SHARD_BYTES", 100_000)
    extract(family.tuned, family.base, tmp_path / "v")
    extract(family.base, family.base, tmp_path / "nothing")
    monkeypatch.undo()
    extract(family.tuned, family.base, tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "v").glob("*.safetensors"))
    count = len(names)
    assert count > 2
    assert names == [f"vector-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert_same_vector(tmp_path / "v", tmp_path / "whole")
    assert VectorReader(tmp_path / "nothing").shards == []


def test_a_donor_without_the_prefix_is_understood(family: Family, tmp_path: Path) -> None:
    """An export of the bare model has no `model.`; the vector has, whichever side lacks it."""

    def strip(found: dict[str, Tensor]) -> None:
        for name in list(found):
            found[name.removeprefix("model.")] = found.pop(name)

    bare_tuned = rewrite(family.tuned, tmp_path / "tuned", strip)
    bare_base = rewrite(family.base, tmp_path / "base", strip)
    extract(family.tuned, family.base, tmp_path / "v")
    extract(bare_tuned, family.base, tmp_path / "v1")
    extract(family.tuned, bare_base, tmp_path / "v2")
    assert_same_vector(tmp_path / "v", tmp_path / "v1")
    assert_same_vector(tmp_path / "v", tmp_path / "v2")


def test_a_float32_donor_goes_with_a_bf16_donor(family: Family, tmp_path: Path) -> None:
    """The same numbers in a wider dtype give the same vector."""

    def widen(found: dict[str, Tensor]) -> None:
        found.update({name: tensor.float() for name, tensor in found.items()})

    wide = rewrite(family.tuned, tmp_path / "tuned", widen)
    extract(family.tuned, family.base, tmp_path / "v")
    extract(wide, family.base, tmp_path / "v1")
    assert_same_vector(tmp_path / "v", tmp_path / "v1")


def test_a_tied_head_that_is_stored_is_the_embedding(family: Family, tmp_path: Path) -> None:
    """One part for both, whichever of the donors stores its tied head a second time."""

    def store_head(found: dict[str, Tensor]) -> None:
        found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()

    stored = {
        name: rewrite(donor, tmp_path / name, store_head)
        for name, donor in (("tuned", family.tuned), ("base", family.base))
    }
    extract(family.tuned, family.base, tmp_path / "v")
    for number, (tuned, base) in enumerate(
        (
            (stored["tuned"], family.base),
            (family.tuned, stored["base"]),
            (stored["tuned"], stored["base"]),
        )
    ):
        extract(tuned, base, tmp_path / f"v{number}")
        assert_same_vector(tmp_path / "v", tmp_path / f"v{number}")
        assert VectorReader(tmp_path / f"v{number}").manifest.tie_word_embeddings


def test_a_head_of_its_own_goes_against_the_other_donors_embedding(
    family: Family, tmp_path: Path
) -> None:
    """A tied donor's output head is its embedding, and that is what was tuned away from."""

    def untie(found: dict[str, Tensor]) -> None:
        found["lm_head.weight"] = found["model.embed_tokens.weight"] * 2

    untied = rewrite(family.tuned, tmp_path / "tuned", untie)
    extract(untied, family.base, tmp_path / "v")
    vector = VectorReader(tmp_path / "v")
    head = vector.tensor("lm_head.weight")
    expected = (
        tensors(untied)["lm_head.weight"].float()
        - tensors(family.base)["model.embed_tokens.weight"].float()
    )
    assert head is not None
    assert torch.equal(head.float(), expected)
    assert not vector.manifest.tie_word_embeddings


def test_bare_exports_of_an_untied_model_are_not_called_tied(tmp_path: Path) -> None:
    """They lack the head as tied ones do; their configuration tells them apart."""
    family = make_family(tmp_path, tied=False)

    def strip(found: dict[str, Tensor]) -> None:
        del found["lm_head.weight"]

    tuned = rewrite(family.tuned, tmp_path / "bare_tuned", strip)
    base = rewrite(family.base, tmp_path / "bare_base", strip)
    assert not extract(tuned, base, tmp_path / "v").manifest.tie_word_embeddings


def test_other_vocabulary_sizes_need_the_word_common(family: Family, tmp_path: Path) -> None:
    """Refused with the way out; then the shared rows, and a manifest that says so."""

    def pad(found: dict[str, Tensor]) -> None:
        embedding = found["model.embed_tokens.weight"]
        found["model.embed_tokens.weight"] = torch.cat((embedding, embedding[:7]))

    padded = rewrite(family.base, tmp_path / "base", pad)
    with pytest.raises(CheckpointError, match="--vocab common"):
        extract(family.tuned, padded, tmp_path / "v")
    extract(family.tuned, padded, tmp_path / "v", vocabulary="common")
    extract(family.tuned, family.base, tmp_path / "same", vocabulary="common")
    manifest = VectorReader(tmp_path / "v").manifest
    assert manifest.vocabulary.model_dump() == {
        "policy": "common",
        "tuned_rows": 512,
        "base_rows": 519,
    }
    assert VectorReader(tmp_path / "same").manifest.vocabulary.policy == "strict"
    assert_same_vector(tmp_path / "v", tmp_path / "same")
    with pytest.raises(ConfigError, match="strict, common"):
        extract(family.tuned, padded, tmp_path / "w", vocabulary="some")


def test_the_roundtrip_is_counted(family: Family, tmp_path: Path) -> None:
    """How many weights base + v misses is counted at extraction, as anyone can count it after."""
    other = make_checkpoint(tmp_path / "other", seed=7)
    for name in STORED_DTYPES:
        made = extract(other, family.base, tmp_path / name, dtype=name)
        found, vector = made.manifest.roundtrip, VectorReader(made.output)
        tuned, base = tensors(other), tensors(family.base)
        wrong = further = 0
        for key, theta in base.items():
            v = vector.tensor(key)
            back = theta if v is None else (theta.float() + v.float()).bfloat16()
            near = [tuned[key] == torch.nextafter(back, back + side) for side in (1, -1)]
            is_near = near[0] | near[1]
            is_wrong = back.view(torch.int16) != tuned[key].view(torch.int16)
            wrong += int(is_wrong.sum())
            further += int((is_wrong & ~is_near & (back != tuned[key])).sum())
        assert found is not None
        assert found.weights == sum(t.numel() for t in tuned.values())
        assert (found.weights - found.exact, found.further_off) == (wrong, further)
        assert found.exact + found.one_unit_off + found.further_off == found.weights
        assert wrong > 0 or name == "float32"


def test_corner_cases_of_the_roundtrip_are_counted(family: Family, tmp_path: Path) -> None:
    """A sign of zero is one unit; a weight that all but vanished is further off."""

    def vanish(found: dict[str, Tensor]) -> None:
        found["model.norm.weight"][:3] = torch.tensor([-0.0, 1e-9, 1.0])

    def start(found: dict[str, Tensor]) -> None:
        found["model.norm.weight"][:3] = torch.tensor([0.0, 1.0, 1.0])

    made = extract(
        rewrite(family.base, tmp_path / "tuned", vanish),
        rewrite(family.base, tmp_path / "base", start),
        tmp_path / "v",
    )
    found = made.manifest.roundtrip
    assert found is not None
    assert (found.one_unit_off, found.further_off) == (1, 1)


@pytest.mark.parametrize(("encoding", "limit"), [("int8", 0.01), ("lowrank", 1.0)])
def test_a_lossy_vector_says_how_lossy(
    family: Family, tmp_path: Path, encoding: str, limit: float
) -> None:
    """The error in all is the relative Frobenius error of what a reader gets, also per tensor."""
    made = extract(family.tuned, family.base, tmp_path / "v", encoding=encoding, rank=4)
    tuned, base = tensors(family.tuned), tensors(family.base)
    vector = VectorReader(tmp_path / "v")
    lost = norm = 0.0
    for name, entry in vector.manifest.tensors.items():
        exact, v = tuned[name].float() - base[name].float(), vector.tensor(name)
        error = torch.linalg.vector_norm(exact - (0 if v is None else v)).item()
        assert entry.error == pytest.approx(error / exact.norm().item(), rel=1e-3, abs=1e-6)
        lost, norm = lost + error**2, norm + exact.norm().item() ** 2
    assert made.error == pytest.approx((lost / norm) ** 0.5, rel=1e-3)
    assert 0 < made.error < limit
    assert made.manifest.roundtrip is None


def test_the_manifest_tells_where_from(family: Family, tmp_path: Path) -> None:
    """Digests of what was read, the licence of the model card, commits of the Hub; no paths."""
    tuned = tmp_path / "tuned"
    shutil.copytree(family.tuned, tuned)
    (tuned / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n# Card\n")
    made = extract(Located(tuned, "team/tuned", "c0ffee"), family.base, tmp_path / "v")
    donor = made.manifest.donors.tuned
    assert (donor.id, donor.revision, donor.license) == ("team/tuned", "c0ffee", "apache-2.0")
    digest = blake3.blake3((tuned / "model.safetensors").read_bytes()).hexdigest()
    assert donor.files["model.safetensors"] == digest
    assert set(donor.files) == {"config.json", "model.safetensors"}
    assert made.manifest.donors.base.license is None
    assert str(tmp_path) not in (tmp_path / "v" / "vector.json").read_text()


def test_norms_are_those_of_the_tensors(family: Family, tmp_path: Path) -> None:
    """Of v, of the base, and how many weights changed: for each tensor."""
    extract(family.tuned, family.base, tmp_path / "v")
    tuned, base = tensors(family.tuned), tensors(family.base)
    for name, entry in VectorReader(tmp_path / "v").manifest.tensors.items():
        v = tuned[name].double() - base[name].double()
        assert entry.norm == pytest.approx(v.norm().item(), rel=1e-5)
        assert entry.base_norm == pytest.approx(base[name].double().norm().item(), rel=1e-5)
        assert entry.changed == int(v.count_nonzero())


def test_remains_of_a_killed_run_are_no_vector(family: Family, tmp_path: Path) -> None:
    """Half-way, by SIGKILL: nothing reads as a vector, and the next run says so and clears up."""
    script = (
        "import os, sys; from pathlib import Path\n"
        "from vllm_rvec.vector.extract import STORED_DTYPES, extract\n"
        "kill = lambda done, total: done * 2 > total and os.kill(os.getpid(), 9)\n"
        "extract(*map(Path, sys.argv[1:4]), on_progress=kill)\n"
    )
    arguments = [str(p) for p in (family.tuned, family.base, tmp_path / "out" / "v")]
    killed = subprocess.run([sys.executable, "-c", script, *arguments], check=False, timeout=60)
    assert killed.returncode == -9
    (remains,) = (tmp_path / "out").iterdir()
    with pytest.raises(VectorFormatError):
        VectorReader(remains)
    with pytest.raises(VectorFormatError):
        VectorReader(tmp_path / "out" / "v")
    with pytest.MonkeyPatch.context() as patch:
        records: list[str] = []
        patch.setattr(
            "vllm_rvec.checkpoint.output.logger.warning",
            lambda text, *args: records.append(text % args),
        )
        extract(family.tuned, family.base, tmp_path / "out" / "v")
    assert "was interrupted" in records[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["v"]


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Twice the largest tensor and a little beyond the imports, for a model of ten times that."""
    rows, columns, count = 4096, 1024, 10
    for name, seed in (("tuned", 1), ("base", 2)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "x"}')
        generator = torch.Generator().manual_seed(seed)
        shapes = [(f"w{i}", (rows, columns)) for i in range(count)]
        with ShardWriter(folder / "model.safetensors", shapes, {}) as writer:
            for key, shape in shapes:
                writer.write(key, torch.randn(shape, generator=generator).bfloat16())
            writer.finish()
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from vllm_rvec.vector.extract import STORED_DTYPES, extract\n"
        "import torch; torch.randn(1 << 17).bfloat16().float().norm()\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10\n"
        "before = peak(); extract(*map(Path, sys.argv[1:4]), encoding=sys.argv[4])\n"
        "print(peak() - before)"
    )
    for encoding in ("auto", "sparse", "int8"):
        arguments = [str(tmp_path / name) for name in ("tuned", "base", encoding)]
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments, encoding],
            check=True,
            timeout=120,
            capture_output=True,
            text=True,
        )
        tensor_bytes = rows * columns * 2
        assert int(done.stdout) < 2 * tensor_bytes + (32 << 20), encoding


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


def test_unknown_choices_are_refused(family: Family, tmp_path: Path) -> None:
    """The message lists what there is."""
    with pytest.raises(ConfigError, match="auto, dense, sparse, int8, lowrank"):
        extract(family.tuned, family.base, tmp_path / "v", encoding="zip")
    with pytest.raises(ConfigError, match="--rank 0"):
        extract(family.tuned, family.base, tmp_path / "v", rank=0)
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
