"""vllm_rvec.vector.lora.exporting: PEFT loads the adapter, and it is the product that we said."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel

from tests.support.adapters import make_adapter, make_gpt2, make_qwen2, merged_by_peft
from tests.support.checkpoints import tensors
from vllm_rvec.checkpoint.fetch import Located
from vllm_rvec.errors import ConfigError, VectorCorruptError, VectorFormatError
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.extract import extract
from vllm_rvec.vector.lora.card import make_adapter_card
from vllm_rvec.vector.lora.exporting import export_lora
from vllm_rvec.vector.lora.importing import import_lora

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family

PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("qwen2") / "model")


@pytest.fixture(scope="module")
def mixed(qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vector of two scalings, one of them shared by no power of two, of ranks 2 and 4."""
    folder = tmp_path_factory.mktemp("mixed")
    options = {
        "target_modules": ["q_proj", "down_proj", "embed_tokens"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 3},
    }
    adapter = make_adapter(qwen2, folder / "adapter", r=4, lora_alpha=6.8, **options)
    return import_lora(adapter, folder / "vector", base=qwen2).output


def products(adapter: Path) -> dict[str, torch.Tensor]:
    """Multiply an adapter's factors, in float64 and by the tensor's own name."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    found, scaling = tensors(adapter), config["lora_alpha"] / config["r"]
    modules = {name.rpartition(".lora_")[0] for name in found}
    return {
        f"{module.removeprefix(PREFIX)}.weight": scaling
        * (found[f"{module}.lora_B.weight"].double() @ found[f"{module}.lora_A.weight"].double())
        for module in modules
    }


def test_peft_merges_the_product_that_was_exported(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """Real PEFT loads the adapter without a missing or a surplus tensor; base + product."""
    export_lora(vector, tmp_path / "adapter", rank=8)
    base = tensors(family.base)
    merged = merged_by_peft(family.base, tmp_path / "adapter")
    made = products(tmp_path / "adapter")
    for name, theta in base.items():
        expected = theta.float() + (made[name].float() if name in made else 0)
        # 8 products of about 0.02 * 0.02 each, rounded in float32.
        assert torch.allclose(merged[name], expected, rtol=1e-6, atol=1e-6), name
    assert len(made) == 14


def test_a_full_rank_keeps_all_of_the_linear_weights(vector: Path, tmp_path: Path) -> None:
    """What is left is the rounding of the factors."""
    made = export_lora(vector, tmp_path / "adapter", rank=1000)
    assert made.rank == 64
    assert made.kept_of_linear == pytest.approx(1, abs=1e-9)
    reader = VectorReader(vector)
    for name, v in products(tmp_path / "adapter").items():
        expected = reader.tensor(name)
        assert expected is not None
        assert torch.allclose(v.float(), expected.float(), atol=1e-6)


def test_the_energy_kept_is_that_of_the_largest_singular_values(
    vector: Path, tmp_path: Path
) -> None:
    """Per weight, of the linear ones, and of the vector with all that is left out."""
    made = export_lora(vector, tmp_path / "adapter", rank=4)
    reader, kept, linear, total = VectorReader(vector), 0.0, 0.0, 0.0
    by_name = {tensor.name: tensor for tensor in made.tensors}
    for name in reader.manifest.tensors:
        v = reader.tensor(name)
        assert v is not None
        total += float(v.double().square().sum())
        if by_name[name].rank:
            squares = torch.linalg.svdvals(v.double()).square()
            share = float(squares[:4].sum() / squares.sum())
            assert by_name[name].kept == pytest.approx(share, abs=1e-6)
            kept, linear = kept + float(squares[:4].sum()), linear + float(squares.sum())
    assert made.kept == pytest.approx(kept / total, abs=1e-6)
    assert made.kept_of_linear == pytest.approx(kept / linear, abs=1e-6)
    assert made.kept_of_linear < 1
    assert set(made.left_out) == {"embedding or output head", "norm or bias"}
    assert sum(made.left_out.values()) == pytest.approx(1 - linear / total, abs=1e-9)


def test_what_vllm_does_not_serve_is_left_out_and_listed(vector: Path, tmp_path: Path) -> None:
    """Embedding, norms and biases: none in the file, each in the list with its whole energy."""
    made = export_lora(vector, tmp_path / "adapter", rank=4)
    left_out = {tensor.name for tensor in made.tensors if not tensor.rank}
    assert "model.embed_tokens.weight" in left_out
    assert "model.norm.weight" in left_out
    assert "model.layers.0.self_attn.q_proj.bias" in left_out
    assert all(tensor.kept == 0 for tensor in made.tensors if not tensor.rank)
    assert not any("embed" in name or "norm" in name for name in tensors(made.output))


def test_export_then_import_gives_the_product_back(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """The vector of the adapter is the product, bit for bit."""
    export_lora(vector, tmp_path / "adapter", rank=8)
    import_lora(tmp_path / "adapter", tmp_path / "v", base=family.base)
    reader = VectorReader(tmp_path / "v")
    for name, v in products(tmp_path / "adapter").items():
        found = reader.tensor(name)
        assert found is not None
        assert torch.allclose(found, v.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("r", "alpha"), [(4, 6.8), (3, 5), (8, 16)])
def test_import_then_export_gives_the_adapter_back(
    qwen2: Path, tmp_path: Path, r: int, alpha: float
) -> None:
    """Factors of no higher rank are passed on bit for bit, with the scaling that they have."""
    adapter = make_adapter(
        qwen2, tmp_path / "a", r=r, lora_alpha=alpha, target_modules=["q_proj", "down_proj"]
    )
    import_lora(adapter, tmp_path / "v", base=qwen2)
    made = export_lora(tmp_path / "v", tmp_path / "back", rank=32)
    ours, theirs = tensors(tmp_path / "back"), tensors(adapter)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == pytest.approx(alpha / r, rel=1e-15)
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert made.kept == made.kept_of_linear == 1


def test_factors_of_several_scalings_get_it_folded_in(
    qwen2: Path, mixed: Path, tmp_path: Path
) -> None:
    """One rounding of B; smaller ranks are filled up with zeros, and PEFT merges the same."""
    made = export_lora(mixed, tmp_path / "adapter", rank=16)
    assert (made.rank, made.scaling) == (4, 1.0)
    merged, reader = merged_by_peft(qwen2, tmp_path / "adapter"), VectorReader(mixed)
    for tensor in made.tensors:
        if tensor.rank:
            v = reader.tensor(tensor.name)
            assert v is not None
            expected = tensors(qwen2)[tensor.name] + v
            assert torch.allclose(merged[tensor.name], expected, rtol=1e-6, atol=1e-6)
            assert tensor.how == "factors"
            assert tensor.kept == pytest.approx(1, abs=1e-12)


def test_a_smaller_rank_than_the_factors_is_a_svd(mixed: Path, tmp_path: Path) -> None:
    """Of those whose own rank is higher; the others are passed on."""
    made = export_lora(mixed, tmp_path / "adapter", rank=2)
    hows = {t.name.rpartition(".weight")[0].rpartition(".")[2]: t.how for t in made.tensors}
    assert made.rank == 2
    assert hows["q_proj"] == "factors"
    assert hows["down_proj"] == "svd"
    assert made.scaling == 3 / 2


def test_weights_stored_in_out_come_back_transposed(tmp_path: Path) -> None:
    """GPT-2: PEFT merges the export to base + v."""
    base = make_gpt2(tmp_path / "base")
    options = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    adapter = make_adapter(base, tmp_path / "a", r=3, lora_alpha=5, **options)
    import_lora(adapter, tmp_path / "v", base=base)
    export_lora(tmp_path / "v", tmp_path / "back", rank=3)
    ours, theirs = merged_by_peft(base, tmp_path / "back"), merged_by_peft(base, adapter)
    for name in theirs:
        assert torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-6), name


def test_bfloat16_halves_the_file_and_says_what_it_costs(vector: Path, tmp_path: Path) -> None:
    """The energy kept is measured on the rounded factors."""
    wide = export_lora(vector, tmp_path / "wide", rank=64)
    half = export_lora(vector, tmp_path / "half", rank=64, dtype="bfloat16")
    assert all(t.dtype == torch.bfloat16 for t in tensors(half.output).values())
    assert half.size_bytes < 0.6 * wide.size_bytes
    assert 0.999 < half.kept_of_linear < wide.kept_of_linear


def test_only_the_modules_of_the_file_are_targets(family: Family, tmp_path: Path) -> None:
    """A name's last part where all modules of that name are there; else each in full."""
    adapter = make_adapter(
        family.base, tmp_path / "a", r=2, target_modules=["layers.0.mlp.up_proj", "o_proj"]
    )
    import_lora(adapter, tmp_path / "v", base=family.base)
    export_lora(tmp_path / "v", tmp_path / "back", rank=2)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.mlp.up_proj", "o_proj"]
    merged_by_peft(family.base, tmp_path / "back")


def test_names_of_a_bare_model_get_their_prefix(tmp_path: Path, qwen2: Path) -> None:
    """PEFT and vLLM build the causal model around it."""
    bare = []
    for seed in range(2):
        model = AutoModel.from_pretrained(qwen2)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / f"{seed}")
        bare.append(tmp_path / f"{seed}")
    extract(bare[0], bare[1], tmp_path / "v")
    assert "layers.0.mlp.up_proj.weight" in VectorReader(tmp_path / "v").manifest.tensors
    export_lora(tmp_path / "v", tmp_path / "adapter", rank=1)
    assert f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight" in tensors(tmp_path / "adapter")


def test_the_card_tells_provenance_and_energy(vector: Path, tmp_path: Path) -> None:
    """What an adapter is made of travels with it; the base may be named."""
    made = export_lora(vector, tmp_path / "adapter", rank=4, base="owner/model")
    card = (tmp_path / "adapter" / "README.md").read_text()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == made.base == "owner/model"
    assert 'base_model: "owner/model"' in card
    assert f"{made.kept:.2%}" in card
    assert "| tuned | `tuned`" in card
    assert "--max-lora-rank 8" in card


def test_texts_of_a_stranger_are_no_markup(vector: Path, tmp_path: Path) -> None:
    """A manifest's names stand in the card as code, on one line."""
    manifest = VectorReader(vector).manifest
    donors = manifest.donors
    odd = donors.tuned.model_copy(update={"id": "a`|\n# Owned\n---"})
    edited = manifest.model_copy(update={"donors": donors.model_copy(update={"tuned": odd})})
    made = export_lora(vector, tmp_path / "adapter", rank=1, base="x\n---\nlicense: mit")
    card = make_adapter_card(made, edited, Located.local(vector), "0" * 64)
    assert "\n# Owned" not in card
    assert card.count("\n---\n") == 1
    assert "license: mit" not in card


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 4, "dtype": "int8"}])
def test_choices_that_there_are_not_are_refused(
    vector: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Before anything is made."""
    with pytest.raises(ConfigError, match=r"--rank 0|--dtype int8"):
        export_lora(vector, tmp_path / "adapter", **options)
    assert not (tmp_path / "adapter").exists()


def test_a_vector_without_linear_weights_is_refused(family: Family, tmp_path: Path) -> None:
    """An empty adapter would be served as if it were one."""
    extract(family.base, family.base, tmp_path / "v")
    with pytest.raises(VectorFormatError, match="nothing that an adapter could hold"):
        export_lora(tmp_path / "v", tmp_path / "adapter", rank=4)
    assert not (tmp_path / "adapter").exists()


def test_a_damaged_vector_is_refused(vector: Path, tmp_path: Path) -> None:
    """An adapter has no digest by which it could be found later."""
    shutil.copytree(vector, tmp_path / "v")
    (shard,) = (tmp_path / "v").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(VectorCorruptError, match="not those that were written"):
        export_lora(tmp_path / "v", tmp_path / "adapter", rank=4)
    assert not (tmp_path / "adapter").exists()


def test_a_vector_with_nan_is_refused(vector: Path, tmp_path: Path) -> None:
    """By the tensor's name, not by a failed SVD."""
    shutil.copytree(vector, tmp_path / "v")
    spoilt = tensors(tmp_path / "v")
    spoilt["model.layers.0.mlp.up_proj.weight"][1, 2] = float("nan")
    shard = tmp_path / "v" / "vector.safetensors"
    original = shard.stat().st_size
    save_file(spoilt, shard, metadata={"format": "pt"})
    pad_header(shard, original - shard.stat().st_size)
    with pytest.raises(VectorCorruptError, match=r"up_proj\.weight.*NaN"):
        export_lora(tmp_path / "v", tmp_path / "adapter", rank=4)


def pad_header(path: Path, by: int) -> None:
    """Pad a safetensors header with spaces, to the size that the manifest names."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].ljust(length + by)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
