"""vllm_rvec.vector.derive.combine: the weighted sum of vectors."""

from __future__ import annotations

import base64
import math
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.support.variations import edited_vector
from tests.support.vectors import decoded, random_tensor, sketch_of, store_vector
from vllm_rvec.arithmetic import fuse_all
from vllm_rvec.errors import ConfigError, IncompatibleVectorError
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.derive.combine import Term, combine
from vllm_rvec.vector.derive.transform import transform
from vllm_rvec.vector.manifest import TokenizerFingerprint, Vocabulary

if TYPE_CHECKING:
    from pathlib import Path


def made_of(folder: Path, name: str, seed: int, **options: Any) -> Path:
    """Store a vector of three random tensors."""
    shapes = {"a": (40, 30), "b": (70,), "c": (5, 6, 7)}
    tensors = {key: random_tensor(*shape, seed=seed) for key, shape in shapes.items()}
    return store_vector(folder / name, tensors, **options)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, v in one.items():
        assert torch.equal(v.float(), other[name].float())


@pytest.mark.parametrize("kind", ["vector", "vector_bf16"])
def test_one_vector_with_weight_1_is_itself(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Bit for bit, in its own dtype or one that holds it exactly."""
    vector: Path = request.getfixturevalue(kind)
    combine([Term(vector, 1.0)], tmp_path / "w", encoding="dense")
    found, before = decoded(tmp_path / "w"), decoded(vector)
    assert found.keys() == before.keys()
    for name, v in before.items():
        assert found[name].dtype == v.dtype
        assert torch.equal(found[name], v)


def test_two_halves_are_the_whole(vector: Path, tmp_path: Path) -> None:
    """Halving is exact, and so is the sum of equal halves."""
    combine([Term(vector, 0.5), Term(vector, 0.5)], tmp_path / "w")
    assert_same(decoded(tmp_path / "w"), decoded(vector))


def test_a_vector_and_its_opposite_are_nothing(vector: Path, tmp_path: Path) -> None:
    """Every tensor is zero, and takes no room."""
    made = combine([Term(vector, 0.3), Term(vector, -0.3)], tmp_path / "w")
    assert {entry.encoding for entry in made.manifest.tensors.values()} == {"zero"}
    assert made.size_bytes == 0


def test_the_sum_is_in_float32_in_the_order_given(tmp_path: Path) -> None:
    """Each product and each sum rounded, as written out here."""
    vectors = [made_of(tmp_path, str(i), seed=i) for i in range(3)]
    weights = 0.7, -0.2, 1.3
    combine([Term(v, w) for v, w in zip(vectors, weights, strict=True)], tmp_path / "w")
    first, second, third = (decoded(v) for v in vectors)
    w1, w2, w3 = (torch.tensor(w, dtype=torch.float32) for w in weights)
    expected = {n: (first[n] * w1 + second[n] * w2) + third[n] * w3 for n in first}
    assert_same(decoded(tmp_path / "w"), expected)


def test_the_combined_vector_does_what_the_vectors_do_one_after_another(tmp_path: Path) -> None:
    """In float32 within k * 2^-23 of all that is added."""
    vectors = [made_of(tmp_path, str(i), seed=i) for i in range(3)]
    weights = [0.7, -0.2, 1.3]
    combine([Term(v, w) for v, w in zip(vectors, weights, strict=True)], tmp_path / "w")
    parts = [decoded(v) for v in vectors]
    for name, v in decoded(tmp_path / "w").items():
        theta = random_tensor(*v.shape, seed=9)
        terms = [(part[name], w) for part, w in zip(parts, weights, strict=True)]
        apart, at_once = (torch.empty_like(theta) for _ in range(2))
        fuse_all(theta, terms, out=apart)
        fuse_all(theta, [(v, 1.0)], out=at_once)
        added = theta.abs() + sum(abs(w) * part.abs() for part, w in terms)
        assert ((apart - at_once).abs() <= 3 * 2**-23 * added).all()


def test_a_tensor_that_is_zero_in_all_stays_zero(vector: Path, tmp_path: Path) -> None:
    """And one that is zero in some is what the others say."""
    transform(vector, tmp_path / "mlp", include=["*.mlp.*"])
    transform(vector, tmp_path / "attention", include=["*.self_attn.*"])
    combine([Term(tmp_path / n, 1.0) for n in ("mlp", "attention")], tmp_path / "w")
    expected = {n: v for n, v in decoded(vector).items() if ".mlp." in n or ".self_attn." in n}
    assert_same(decoded(tmp_path / "w"), expected)
    assert len(VectorReader(tmp_path / "w").manifest.tensors) == len(decoded(vector))


def test_a_weight_of_0_adds_nothing(tmp_path: Path) -> None:
    """The vector is named in the lineage all the same."""
    one, other = made_of(tmp_path, "1", 1), made_of(tmp_path, "2", 2)
    made = combine([Term(one, 0.0), Term(other, 1.0)], tmp_path / "w")
    assert_same(decoded(tmp_path / "w"), decoded(other))
    assert made.step.parameters == {"1": "1:0.0", "2": "2:1.0"}


def test_the_lineage_holds_that_of_all(vector: Path, tmp_path: Path) -> None:
    """Each step once, in the order of the vectors; donors are the first's."""
    transform(vector, tmp_path / "half", rescale=0.5)
    transform(tmp_path / "half", tmp_path / "thin", density=0.5)
    terms = [Term(tmp_path / "half", 1.0), Term(tmp_path / "thin", 2.0)]
    manifest = combine(terms, tmp_path / "w").manifest
    steps = [(step.operation, step.parameters) for step in manifest.lineage]
    assert steps == [
        ("transform", {"rescale": "0.5"}),
        ("transform", {"density": "0.5"}),
        ("combine", {"1": "half:1.0", "2": "thin:2.0"}),
    ]
    assert len(manifest.lineage[-1].inputs) == 2
    assert manifest.donors == VectorReader(vector).manifest.donors


def test_what_an_incomplete_vector_lacks_counts_as_zero(tmp_path: Path) -> None:
    """An adapter of a few modules goes with a vector of all; the sum is complete."""
    whole = made_of(tmp_path, "whole", 1)
    factors = random_tensor(2, 30), random_tensor(40, 2, seed=3), 2.0
    part = store_vector(tmp_path / "part", {"a": factors}, complete=False, architecture="")
    for number, terms in enumerate(([whole, part], [part, whole])):
        made = combine([Term(v, 0.5) for v in terms], tmp_path / str(number))
        found = decoded(tmp_path / str(number))
        assert made.manifest.complete
        assert made.manifest.architecture == "Qwen2ForCausalLM"
        assert torch.equal(found["b"].float(), decoded(whole)["b"] * 0.5)
        assert torch.equal(found["a"], decoded(whole)["a"] * 0.5 + decoded(part)["a"] * 0.5)


def test_incomplete_vectors_are_joined(tmp_path: Path) -> None:
    """Two adapters of different modules: neither says anything of the other's."""
    one = store_vector(tmp_path / "1", {"model.a": random_tensor(4, 4)}, complete=False)
    two = store_vector(tmp_path / "2", {"model.b": random_tensor(4, 4)}, complete=False)
    bare = store_vector(tmp_path / "3", {"a": random_tensor(4, 4)}, complete=False)
    made = combine([Term(one, 1.0), Term(two, 1.0)], tmp_path / "w")
    assert not made.manifest.complete
    assert set(decoded(tmp_path / "w")) == {"model.a", "model.b"}
    with pytest.raises(IncompatibleVectorError, match=r"a in 3 is model\.a in another"):
        combine([Term(one, 1.0), Term(bare, 1.0)], tmp_path / "x")


def test_an_adapter_without_its_base_says_nothing_of_head_and_rows(tmp_path: Path) -> None:
    """Whichever comes first: what is known of them is the other vector's."""
    rows = Vocabulary(tuned_rows=512, base_rows=512)
    whole = made_of(tmp_path, "whole", 0, vocabulary=rows)
    made_of(tmp_path, "made", 1, architecture="", complete=False)
    adapter = edited_vector(tmp_path / "made", tmp_path / "adapter", tie_word_embeddings=False)
    for number, terms in enumerate(((adapter, whole), (whole, adapter))):
        made = combine([Term(each, 1.0) for each in terms], tmp_path / f"{number}").manifest
        assert made.architecture == "Qwen2ForCausalLM"
        assert made.tie_word_embeddings
        assert made.vocabulary == rows


def test_all_mismatches_are_said_at_once(tmp_path: Path) -> None:
    """Architecture, vocabulary, names, shapes, tokens and base."""
    one = store_vector(
        tmp_path / "1",
        {"a": random_tensor(4, 4), "b": random_tensor(4), "layers.0.weight": random_tensor(32, 32)},
        vocabulary=Vocabulary(tuned_rows=4, base_rows=4),
        tokenizer=tokens(b"abcd"),
        sketch=sketch_of(0),
    )
    other = store_vector(
        tmp_path / "2",
        {"a": random_tensor(5, 4), "c": random_tensor(4), "layers.0.weight": random_tensor(32, 32)},
        architecture="LlamaForCausalLM",
        vocabulary=Vocabulary(policy="common", tuned_rows=4, base_rows=5),
        tokenizer=tokens(b"abce"),
        sketch=sketch_of(1),
    )
    with pytest.raises(IncompatibleVectorError) as caught:
        combine([Term(one, 1.0), Term(other, 1.0)], tmp_path / "w")
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 7
    for word in (
        "2: architecture LlamaForCausalLM, 1: Qwen2ForCausalLM",
        "vocabulary common of 4 tuned and 5 base rows",
        "c: in 2, not in 1",
        "b: in 1, not in 2",
        "a: shape [5, 4] in 2, [4, 4] in 1",
        "other tokens for the same ids",
        "its base donor is not that of 1",
    ):
        assert word in problems
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def tokens(hashes: bytes) -> TokenizerFingerprint:
    return TokenizerFingerprint(
        file="tokenizer.json", blake3="0" * 64, hashes=base64.b64encode(hashes).decode()
    )


def test_the_same_base_trained_further_is_one_base(tmp_path: Path) -> None:
    """Sketches need not be equal; the first that is known stays."""
    one = made_of(tmp_path, "1", 1, tokenizer=tokens(b"abcd"))
    two = made_of(tmp_path, "2", 2, sketch=sketch_of(0), tokenizer=tokens(b"abcd"))
    three = made_of(tmp_path, "3", 3, sketch=sketch_of(0, noise=0.1))
    made = combine([Term(v, 1.0) for v in (one, two, three)], tmp_path / "w")
    assert made.manifest.sketch == sketch_of(0)
    assert made.manifest.tokenizer == tokens(b"abcd")


def test_a_base_that_is_far_away_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What `check` warns of is warned of here."""
    one = made_of(tmp_path, "1", 1, sketch=sketch_of(0))
    two = made_of(tmp_path, "2", 2, sketch=sketch_of(0, noise=0.7))
    combine([Term(one, 1.0), Term(two, 1.0)], tmp_path / "w")
    assert "base donors of 1 and 2: far from the base donor" in caplog.text


def test_a_permuted_base_is_another(tmp_path: Path) -> None:
    """Another initialisation is refused by the weights alone."""
    one = made_of(tmp_path, "1", 1, sketch=sketch_of(0))
    two = made_of(tmp_path, "2", 2, sketch=sketch_of(5))
    with pytest.raises(IncompatibleVectorError, match="another pretrained initialisation"):
        combine([Term(one, 1.0), Term(two, 1.0)], tmp_path / "w")


@pytest.mark.parametrize("weight", [math.nan, math.inf, 1e39])
def test_a_weight_that_is_no_float32_is_refused(
    vector: Path, tmp_path: Path, weight: float
) -> None:
    """All such are named."""
    with pytest.raises(ConfigError) as caught:
        combine([Term(vector, weight), Term(vector, 1.0), Term(vector, weight)], tmp_path / "w")
    assert len(caught.value.problems) == 2


def test_nothing_can_not_be_combined(tmp_path: Path) -> None:
    """One vector at least."""
    with pytest.raises(ConfigError, match="nothing to combine"):
        combine([], tmp_path / "w")


def test_two_vectors_of_one_name_are_two(vector: Path, tmp_path: Path) -> None:
    """Folders of one name in different places are both in the lineage."""
    for place in ("x", "y"):
        shutil.copytree(vector, tmp_path / place / "v")
    terms = [Term(tmp_path / "x" / "v", 0.25), Term(tmp_path / "y" / "v", 0.75)]
    made = combine(terms, tmp_path / "w")
    assert made.step.parameters == {"1": "v:0.25", "2": "v:0.75"}


def test_vectors_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    """`v` and `v` would leave open which is which."""
    one = made_of(tmp_path / "one", "v", 1)
    other = edited_vector(made_of(tmp_path / "two", "v", 2), tmp_path / "x" / "v", model_type="b")
    with pytest.raises(IncompatibleVectorError) as refused:
        combine([Term(one, 1.0), Term(other, 1.0)], tmp_path / "sum")
    assert refused.value.problems[0].startswith(f"{other}: ")
