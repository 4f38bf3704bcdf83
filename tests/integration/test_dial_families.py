"""A dial against engines that were fused at each alpha: tokens and log-probabilities.

Float32, greedy, all alphas in one batch, with prefix caching and chunked prefill. What has the same
weights but sums in another order differs by rounding only: 2e-5 here, where alphas that differ by
0.001 would give 1e-4.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.checkpoints import make_vector
from tests.support.dial_answers import dial, refusals, run_jobs
from tests.support.families import KINDS
from vllm_rvec.vector.compatibility.dialable import DIALABLE

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family

pytestmark = pytest.mark.engine

ALPHAS = (-1.0, 0.0, 0.3)
"""Of the requests of a batch."""
FUSED = (-1.0, 0.3)
"""Of the engines beside it; that 0 is the plain engine, `test_dial_requests` says."""
PROMPTS = [
    [(7 * place + 11 * number) % 90 + 3 for place in range(8 + 13 * number)] for number in range(3)
]
ALONE = 0.3
"""Of requests that are asked each by itself: steps of one token."""
TOLERANCE = 5e-5
EXPERTS = ["qwen3-moe", "mixtral"]
"""A dial serves these as long as their experts stay as they are."""
DIALED = [
    *("qwen2", "qwen2-tied", "qwen3", "llama", "llama-biases", "mistral", "gemma2", "gemma3"),
    *("phi3", "olmo2", "gpt2", "paligemma", "idefics3"),
    *EXPERTS,
]
LATENT = "deepseek-v2"
WITHOUT_EXPERTS = "deepseek-v2 without its experts"
REFUSED = [LATENT, "deepseek-v3", "gpt-oss", "llama4"]


def _recipe(kind: str, vector: Path) -> list[dict[str, Any]]:
    left_out = ["*experts*", "*.gate.weight"] if kind in EXPERTS else []
    return [{"path": str(vector), "exclude": left_out}]


@pytest.fixture(scope="module")
def replies(
    families: dict[str, Family], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[list[dict[str, Any]]]]:
    """What a dial and two fused engines of each family answer."""
    jobs = []
    folder = tmp_path_factory.mktemp("dialed")
    for kind in DIALED:
        vectors = _recipe(kind, make_vector(families[kind], folder / kind))
        common: dict[str, Any] = {"model": str(families[kind].target), "dtype": "float32"}
        if KINDS[kind].is_multimodal:
            common["limit_mm_per_prompt"] = {"image": 0}
        requests = [{"prompt": p, "alpha": a} for p in PROMPTS for a in ALPHAS]
        requests += [{"prompt": p, "alpha": ALONE} for p in PROMPTS]
        job = {"requests": requests, "alone": len(PROMPTS)}
        jobs.append({"engine": common | dial(vectors=vectors), **job})
        for alpha in FUSED:
            fused = {"vectors": vectors, "alpha": alpha}
            engine = common | {"load_format": "rvec", "model_loader_extra_config": fused}
            jobs.append(
                {"engine": engine, "requests": [{"prompt": p, "alpha": None} for p in PROMPTS]}
            )
    found = iter(run_jobs(jobs))
    return {kind: [next(found) for _ in range(1 + len(FUSED))] for kind in DIALED}


@pytest.mark.parametrize("kind", DIALED)
def test_a_dial_answers_as_engines_fused_at_each_alpha(
    replies: dict[str, list[list[dict[str, Any]]]], kind: str
) -> None:
    """The same tokens; log-probabilities within rounding; and no two alphas answer alike.

    All at once, and one by one.
    """
    dialed, *fused = replies[kind]
    dialed = dialed[: -len(PROMPTS)]
    for alpha, expected in zip(FUSED, fused, strict=True):
        found = dialed[ALPHAS.index(alpha) :: len(ALPHAS)]
        for mine, theirs in zip(found, expected, strict=True):
            assert mine["tokens"] == theirs["tokens"]
            assert mine["logprobs"][0] == pytest.approx(theirs["logprobs"][0], abs=TOLERANCE)
    alone = replies[kind][0][-len(PROMPTS) :]
    for mine, theirs in zip(alone, fused[FUSED.index(ALONE)], strict=True):
        assert mine["tokens"] == theirs["tokens"]
        assert mine["logprobs"][0] == pytest.approx(theirs["logprobs"][0], abs=TOLERANCE)
    several = [dialed[number :: len(ALPHAS)] for number in range(len(ALPHAS))]
    seen = {json.dumps([reply["logprobs"] for reply in one]) for one in several}
    assert len(seen) == len(ALPHAS)


def test_every_family_that_serve_offers_a_dial_for_is_here() -> None:
    """`serve` picks by `model_type`."""
    assert {KINDS[kind].model_type for kind in DIALED} >= DIALABLE


@pytest.fixture(scope="module")
def refused(
    families: dict[str, Family], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What a dial of each says as it fails; the last without the experts of its vector."""
    folder = tmp_path_factory.mktemp("refused")
    vectors = {kind: make_vector(families[kind], folder / kind) for kind in REFUSED}
    recipes = [(kind, {"path": str(vector)}) for kind, vector in vectors.items()]
    left_out: dict[str, Any] = {"exclude": ["*experts*", "*.gate.weight"]}
    recipes.append((LATENT, {"path": str(vectors[LATENT])} | left_out))
    found = refusals(
        [
            {"model": str(families[kind].target), "dtype": "float32"} | dial(vectors=[recipe])
            for kind, recipe in recipes
        ]
    )
    return dict(zip([*REFUSED, WITHOUT_EXPERTS], found, strict=True))


def test_latent_attention_is_refused_though_its_layers_are_linear(refused: dict[str, str]) -> None:
    """Decoding uses matrices that were made of the layer's; the rehearsal would not show it."""
    said = refused[WITHOUT_EXPERTS]
    assert "kv_b_proj: latent attention makes other matrices of it" in said


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_dial_cant_apply_is_refused_by_name(refused: dict[str, str], kind: str) -> None:
    """Experts, and tensors that are laid out anew; with the way out."""
    assert refused[kind].startswith("ConfigError")
    assert "--mode fused" in refused[kind]
    assert "model.layers.1." in refused[kind]
