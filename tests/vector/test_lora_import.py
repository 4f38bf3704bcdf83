"""vllm_rvec.vector.lora.importing: base + 1 * v is what PEFT itself merges."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.support.adapters import make_adapter, make_gpt2, make_qwen2, merged_by_peft
from tests.support.checkpoints import tensors
from tests.support.hub import run_hub, use_hub
from vllm_rvec.checkpoint.fetch import Located, locate_adapter
from vllm_rvec.errors import CheckpointError
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.extract import extract
from vllm_rvec.vector.lora.adapter import Adapter
from vllm_rvec.vector.lora.importing import import_lora

if TYPE_CHECKING:
    from pathlib import Path

ROUNDING = 2.0**-24
"""Half a unit in the last place of float32, relative."""


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("qwen2") / "untied")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("qwen2") / "tied", tied=True)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gpt2(tmp_path_factory.mktemp("gpt2") / "model")


@pytest.fixture(scope="module")
def plain(qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain adapter of the untied Qwen2."""
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    return make_adapter(qwen2, folder, r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])


def check_merged(base: Path, adapter: Path, vector: Path) -> set[str]:
    """Compare base + v with PEFT's merge; return the names of the tensors that v changes.

    PEFT multiplies and sums R products in float32, and both sides round their sum with the base:
    the bound is (R + 3) * 2^-24 * |scaling| |B| |A| + 2 * 2^-24 * (|base| + |v|), per element.
    """
    reader, theta, merged = VectorReader(vector), tensors(base), merged_by_peft(base, adapter)
    manifest, changed = reader.manifest, set()
    assert set(manifest.tensors) == set(theta)
    for name, entry in manifest.tensors.items():
        v = reader.tensor(name)
        if v is None:
            assert torch.equal(merged[name], theta[name]), name
            continue
        changed.add(name)
        bound = 2 * ROUNDING * (theta[name].abs() + v.abs())
        if entry.encoding == "lowrank":
            a, b = (reader.part(f"{name}:lora_{side}").abs() for side in "AB")
            bound += (a.shape[0] + 3) * ROUNDING * abs(entry.scaling or 0.0) * (b @ a)
        assert (theta[name] + v - merged[name]).abs().le(bound).all(), name
        assert v.abs().max() > 100 * bound.max(), "the comparison would not see v"
    return changed


QWEN2_ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {"r": 6, "lora_alpha": 5, "use_rslora": True, "target_modules": ["k_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": "all-linear",
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "^model.layers.0.*down_proj": 3},
        "alpha_pattern": {"up_proj": 20, r"layers\.(0|1)\.self_attn\.k_proj": 1},
    },
    "embedding": {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "o_proj"]},
    "modules_to_save": {
        "r": 2,
        "target_modules": ["o_proj"],
        "modules_to_save": ["lm_head", "norm"],
    },
    "biases": {"r": 2, "target_modules": ["q_proj"], "bias": "all"},
}


@pytest.mark.parametrize("kind", QWEN2_ADAPTERS)
def test_base_plus_vector_is_what_peft_merges(qwen2: Path, tmp_path: Path, kind: str) -> None:
    """Within float32 rounding, for every feature that a plain sum can have."""
    adapter = make_adapter(qwen2, tmp_path / "adapter", **QWEN2_ADAPTERS[kind])
    import_lora(adapter, tmp_path / "v", base=qwen2)
    assert check_merged(qwen2, adapter, tmp_path / "v")


@pytest.mark.parametrize("targets", [["c_attn", "c_proj", "wte"], ["c_attn", "c_proj", "c_fc"]])
def test_weights_stored_in_out_get_the_transposed_product(
    gpt2: Path, tmp_path: Path, targets: list[str]
) -> None:
    """GPT-2's Conv1D, square ones among them, and its embedding."""
    adapter = make_adapter(
        gpt2, tmp_path / "adapter", r=3, lora_alpha=5, target_modules=targets, fan_in_fan_out=True
    )
    import_lora(adapter, tmp_path / "v", base=gpt2)
    changed = check_merged(gpt2, adapter, tmp_path / "v")
    assert "transformer.h.0.attn.c_proj.weight" in changed


def test_tied_embeddings_are_changed_once(tied: Path, tmp_path: Path) -> None:
    """The base has no output head of its own, and so has the vector none."""
    adapter = make_adapter(tied, tmp_path / "adapter", r=2, target_modules=["embed_tokens"])
    made = import_lora(adapter, tmp_path / "v", base=tied)
    assert check_merged(tied, adapter, tmp_path / "v") == {"model.embed_tokens.weight"}
    assert made.manifest.tie_word_embeddings
    assert "lm_head.weight" not in made.manifest.tensors


def test_an_embedding_that_was_trained_tied_is_taken(tied: Path, tmp_path: Path) -> None:
    """PEFT saves it twice, as embedding and as head: it is added once."""
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    adapter = make_adapter(tied, tmp_path / "a", r=2, target_modules=["q_proj"], **options)
    import_lora(adapter, tmp_path / "v", base=tied)
    assert "model.embed_tokens.weight" in check_merged(tied, adapter, tmp_path / "v")


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_half_of_a_tied_pair_is_refused(tied: Path, tmp_path: Path, module: str) -> None:
    """PEFT unties the model there; a vector of a tied base can't."""
    adapter = make_adapter(
        tied, tmp_path / "a", r=2, target_modules=["q_proj"], modules_to_save=[module]
    )
    with pytest.raises(CheckpointError, match="the base ties embedding and output head"):
        import_lora(adapter, tmp_path / "v", base=tied)


def test_factors_are_stored_as_they_are(qwen2: Path, plain: Path, tmp_path: Path) -> None:
    """Their bits and their dtype; the scaling is in the manifest."""
    adapter = tmp_path / "adapter"
    shutil.copytree(plain, adapter)
    halved = {name: t.bfloat16() for name, t in tensors(adapter).items()}
    save_file(halved, adapter / "adapter_model.safetensors")
    import_lora(adapter, tmp_path / "v", base=qwen2)
    stored, name = tensors(tmp_path / "v"), "model.layers.0.self_attn.q_proj"
    for side in "AB":
        expected = halved[f"base_model.model.{name}.lora_{side}.weight"]
        assert stored[f"{name}.weight:lora_{side}"].dtype == torch.bfloat16
        assert torch.equal(stored[f"{name}.weight:lora_{side}"], expected)
    entry = VectorReader(tmp_path / "v").manifest.tensors[f"{name}.weight"]
    assert (entry.encoding, entry.scaling, entry.error) == ("lowrank", 6 / 4, 0)


def test_the_manifest_is_that_of_an_extracted_vector(
    qwen2: Path, plain: Path, tmp_path: Path
) -> None:
    """With the base: complete, with its kind, its norms and its sketch."""
    ours = import_lora(plain, tmp_path / "lora", base=qwen2).manifest
    theirs = extract(qwen2, qwen2, tmp_path / "extracted").manifest
    assert ours.complete
    assert ours.formula == "scaling * B @ A"
    assert (ours.architecture, ours.model_type) == (theirs.architecture, theirs.model_type)
    assert ours.sketch == theirs.sketch
    assert ours.vocabulary == theirs.vocabulary
    assert ours.donors.base == theirs.donors.base
    assert ours.donors.tuned.files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    for name, entry in ours.tensors.items():
        assert entry.base_norm == pytest.approx(theirs.tensors[name].base_norm, rel=1e-6)


def test_norms_are_those_of_the_products(qwen2: Path, plain: Path, tmp_path: Path) -> None:
    """Though no product is computed for them."""
    made = import_lora(plain, tmp_path / "v", base=qwen2)
    reader = VectorReader(tmp_path / "v")
    squares = 0.0
    for name, entry in made.manifest.tensors.items():
        if (v := reader.tensor(name)) is not None:
            assert entry.norm == pytest.approx(float(v.double().norm()), rel=1e-6)
            squares += entry.norm**2
    assert made.norm == pytest.approx(squares**0.5)


def test_without_the_base_names_are_what_peft_implies(plain: Path, tmp_path: Path) -> None:
    """Not complete, of no architecture, and the base keeps the name that the adapter gives."""
    adapter = tmp_path / "adapter"
    shutil.copytree(plain, adapter)
    set_config(adapter, base_model_name_or_path="someone/model", revision="abc")
    manifest = import_lora(adapter, tmp_path / "v").manifest
    assert not manifest.complete
    assert (manifest.architecture, manifest.model_type, manifest.sketch) == ("", "", None)
    assert set(manifest.tensors) == {
        f"model.layers.{layer}.{module}.weight"
        for layer in range(2)
        for module in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert manifest.tensors["model.layers.1.mlp.down_proj.weight"].shape == (32, 64)
    assert (manifest.donors.base.id, manifest.donors.base.revision) == ("someone/model", "abc")


def test_the_path_of_another_machine_is_not_written_down(plain: Path, tmp_path: Path) -> None:
    """Only its last name: manifests travel."""
    adapter = tmp_path / "adapter"
    shutil.copytree(plain, adapter)
    set_config(adapter, base_model_name_or_path="/home/someone/models/base-7b")
    assert import_lora(adapter, tmp_path / "v").manifest.donors.base.id == "base-7b"


def test_the_local_base_that_the_adapter_names_is_used(plain: Path, tmp_path: Path) -> None:
    """PEFT wrote the folder's path, and it is here."""
    assert import_lora(plain, tmp_path / "v").manifest.complete


def set_config(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def set_tensors(adapter: Path, changed: dict[str, torch.Tensor | None]) -> None:
    path = adapter / "adapter_model.safetensors"
    found = load_file(path) | changed
    save_file({name: t for name, t in found.items() if t is not None}, path)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({f"{Q}.lora_A.weight": None}, "only one of its two factors"),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 31)}, r"shape \[32, 31\], the base's \[32, 32\]"),
        ({f"{Q}.lora_A.weight": torch.zeros(3, 32)}, "the rank is 4"),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 32, 1)}, "factors are matrices"),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int8)}, "dtype I8"),
        ({f"{Q}.lora_magnitude_vector": torch.zeros(32)}, "not one of the tensors that a plain"),
        ({f"{Q}.lora_B.bias": torch.zeros(32)}, "not one of the tensors that a plain"),
        ({f"{Q}.base_layer.lora_A.weight": torch.zeros(4, 32)}, "a second pair of factors"),
        ({"base_model.model.other.weight": torch.zeros(2)}, "the base has no such tensor"),
        ({"base_model.model.a:b.weight": torch.zeros(2)}, "no name that a module can have"),
        ({Q.removeprefix("base_model.model.") + ".lora_A.weight": torch.zeros(4, 32)}, "twice"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    qwen2: Path, plain: Path, tmp_path: Path, changed: dict[str, Any], problem: str
) -> None:
    """By name and reason; nothing is written."""
    adapter = tmp_path / "adapter"
    shutil.copytree(plain, adapter)
    set_tensors(adapter, changed)
    with pytest.raises(CheckpointError, match=problem):
        import_lora(adapter, tmp_path / "v", base=qwen2)
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_factors_without_a_finite_product_are_refused(
    qwen2: Path, plain: Path, tmp_path: Path, value: float
) -> None:
    """One such weight spoils every answer."""
    adapter = tmp_path / "adapter"
    shutil.copytree(plain, adapter)
    set_tensors(adapter, {f"{Q}.lora_B.weight": torch.full((32, 4), value)})
    with pytest.raises(CheckpointError, match="no finite product"):
        import_lora(adapter, tmp_path / "v", base=qwen2)


def test_all_problems_are_named_at_once(plain: Path, tmp_path: Path) -> None:
    """Of the configuration and of the tensors."""
    adapter = tmp_path / "adapter"
    shutil.copytree(plain, adapter)
    set_config(adapter, use_dora=True, init_lora_weights="pissa", base_model_name_or_path=None)
    set_tensors(adapter, {"base_model.model.lm_head.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError) as caught:
        import_lora(adapter, tmp_path / "v")
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert "use_dora" in told
    assert "init_lora_weights pissa" in told
    assert "lm_head.weight: trained as a whole" in told
    assert "give --base" in told


def test_a_pickle_is_never_read(plain: Path, tmp_path: Path) -> None:
    """And the message says why."""
    adapter = tmp_path / "adapter"
    shutil.copytree(plain, adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle files can run code"):
        import_lora(adapter, tmp_path / "v")


def test_a_file_that_is_cut_off_is_refused(plain: Path, tmp_path: Path) -> None:
    """By safetensors' own check of the header."""
    adapter = tmp_path / "adapter"
    shutil.copytree(plain, adapter)
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="can't be read as safetensors"):
        import_lora(adapter, tmp_path / "v")


def test_a_real_dora_adapter_is_refused(qwen2: Path, tmp_path: Path) -> None:
    """As PEFT writes it."""
    adapter = make_adapter(qwen2, tmp_path / "a", r=2, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(CheckpointError, match="use_dora: DoRA scales every row"):
        import_lora(adapter, tmp_path / "v", base=qwen2)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@settings(
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(at=st.integers(0, 1 << 30), value=st.binary(min_size=1, max_size=4))
def test_damaged_files_end_in_an_error_or_in_an_adapter(
    plain: Path, tmp_path: Path, name: str, at: int, value: bytes
) -> None:
    """Any bytes anywhere in the configuration or the header: never a crash."""
    adapter = tmp_path / "adapter"
    shutil.copytree(plain, adapter, dirs_exist_ok=True)
    data = bytearray((plain / name).read_bytes())
    header = min(len(data), 8 + int.from_bytes(data[:8], "little"))
    at %= header if name.endswith(".safetensors") else len(data)
    data[at : at + len(value)] = value
    (adapter / name).write_bytes(data)
    try:
        opened = Adapter(Located.local(adapter))
    except CheckpointError:
        return
    for factors in opened.factors.values():
        assert all(matrix.dim() == 2 for matrix in opened.matrices(factors))


def test_an_adapter_is_fetched_from_the_hub_without_its_pickles(
    plain: Path, qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its id; the commit is in the manifest."""
    adapter = tmp_path / "adapter"
    shutil.copytree(plain, adapter)
    (adapter / "training_args.bin").write_bytes(b"\x80\x04.")
    with run_hub() as hub:
        use_hub(hub, tmp_path / "hf", monkeypatch)
        commit = hub.add_folder("owner/adapter", adapter)
        located = locate_adapter("owner/adapter")
        assert not (located.folder / "training_args.bin").exists()
        donor = import_lora(located, tmp_path / "v", base=qwen2).manifest.donors.tuned
    assert (donor.id, donor.revision) == ("owner/adapter", commit)


def test_a_model_on_the_hub_is_no_adapter(
    qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anything of it is fetched."""
    with run_hub() as hub:
        use_hub(hub, tmp_path / "hf", monkeypatch)
        hub.add_folder("owner/model", qwen2)
        with pytest.raises(CheckpointError, match=r"there is no adapter_config\.json in it"):
            locate_adapter("owner/model")
        assert "model.safetensors" not in hub.fetched()
