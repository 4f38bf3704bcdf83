"""What a request may ask of a dial, and how vLLM may run it: each against fused engines."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.checkpoints import make_merged, make_vector
from tests.support.dial_answers import dial, run_jobs
from tests.support.quantized import int8_copy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.checkpoints import Family

pytestmark = pytest.mark.engine

ALPHAS = (-1.0, 0.0, 0.3)
PROMPTS = [[(7 * i + 11 * n) % 90 + 3 for i in range(8 + 13 * n)] for n in range(3)]
LONG = [[(5 * i + 17 * n) % 90 + 3 for i in range(250)] for n in range(2)]
"""Just under two blocks of the cache; 20 tokens more need a third."""
ROOM: dict[str, Any] = {"max_model_len": 512, "hf_overrides": {"max_position_embeddings": 512}}
TOLERANCE = 5e-5
"""As for families: sums in another order, in float32."""

Replies = list[dict[str, Any]]


class Jobs:
    """Engines by name, and what each is asked."""

    def __init__(self, family: Family, vectors: list[Path]) -> None:
        self.target, self.vectors = str(family.target), [str(vector) for vector in vectors]
        self.jobs: dict[str, dict[str, Any]] = {}

    def fused(self, name: str, alphas: list[float], requests: list[Any], **engine: Any) -> None:
        """An engine at one alpha; of each vector where there are several."""
        parts = zip(self.vectors, alphas, strict=False)
        recipe = [{"path": path, "alpha": alpha} for path, alpha in parts]
        own = {"load_format": "rvec", "model_loader_extra_config": {"vectors": recipe}}
        self.add(name, requests, own | engine)

    def dial(
        self, name: str, requests: list[Any], extra: dict[str, Any] | None = None, **engine: Any
    ) -> None:
        """A dial of the first vector, or of those in `extra`."""
        given = extra or {}
        vectors = {} if "vectors" in given else {"vector": self.vectors[0]}
        self.add(name, requests, dial(**vectors, **given) | engine)

    def add(self, name: str, requests: list[Any], engine: dict[str, Any]) -> None:
        """Any other engine."""
        how: dict[str, Any] = {
            key: engine.pop(key) for key in ("batch", "counts_preemptions") if key in engine
        }
        engine = {"model": self.target, "dtype": "float32"} | engine
        self.jobs[name] = {"engine": engine, "requests": requests, **how}

    def run(self, **env: str) -> dict[str, Replies]:
        """Start them, one after the other."""
        return dict(zip(self.jobs, run_jobs(list(self.jobs.values()), **env), strict=True))


def asked(alpha: Any, prompts: list[list[int]] = PROMPTS, **params: Any) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "alpha": alpha, **params} for prompt in prompts]


def mixed(prompts: list[list[int]] = PROMPTS, **params: Any) -> list[dict[str, Any]]:
    """Every prompt at every alpha, in one batch."""
    return [r for prompt in prompts for a in ALPHAS for r in asked(a, [prompt], **params)]


MANY: dict[str, Any] = {"n": 3, "temperature": 1.0, "seed": 11, "prompt_logprobs": 0}
"""Sampled, and every token of the prompt scored."""


@pytest.fixture(scope="module")
def replies(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Replies]:
    folder = tmp_path_factory.mktemp("requests")
    vector = make_vector(family, folder / "reasoning")
    other = make_vector(swapped(family), folder / "style")
    jobs = Jobs(family, [vector, other])
    for alpha in ALPHAS:
        jobs.fused(f"fused {alpha}", [alpha], asked(None) + asked(None, **MANY))
        jobs.fused(f"fused long {alpha}", [alpha], asked(None, LONG, max_tokens=20), **ROOM)
    jobs.dial("chunks", mixed(prompt_logprobs=0), max_num_batched_tokens=16)
    jobs.dial("several", mixed(**MANY))  # not in chunks: vLLM's CPU build can't then use a seed
    jobs.dial("compiled", mixed(), enforce_eager=False)
    jobs.dial("synchronous", mixed(), async_scheduling=False)
    jobs.dial("default", asked(None), {"alpha": 0.3})
    tight: dict[str, Any] = {"num_gpu_blocks_override": 8, "disable_log_stats": False}
    jobs.dial("preempted", mixed(LONG, max_tokens=20), **ROOM, **tight, counts_preemptions=True)
    shared = [r for a in (0.0, 0.3, 0.3, 0.0, -1.0, 0.3) for r in asked(a, LONG[:1], max_tokens=20)]
    jobs.dial("shared prompt", shared, **ROOM, batch=1)
    names = {"vectors": [{"path": str(vector)}, {"path": str(other), "name": "manner"}]}
    both = asked([0.3, -0.5]) + asked({"manner": -0.5, "reasoning": 0.3}) + asked({"manner": 1})
    jobs.dial("two vectors", both, names)
    jobs.fused("fused two", [0.3, -0.5], asked(None))
    jobs.fused("fused second", [0.0, 1.0], asked(None))
    jobs.dial("int8", mixed(), {"vector_dtype": "int8"})
    jobs.dial("zeros", asked(0.0) + asked(0.0, **MANY))
    jobs.add("plain", asked(None) + asked(None, **MANY), {})
    return jobs.run()


def swapped(family: Family) -> Family:
    """Donors the other way round: another vector of the same family."""
    return replace(family, tuned=family.base, base=family.tuned)


def assert_alike(mine: Replies, theirs: Replies, tolerance: float = TOLERANCE) -> None:
    for one, other in zip(mine, theirs, strict=True):
        assert one["tokens"] == other["tokens"]
        for steps, expected in zip(one["logprobs"], other["logprobs"], strict=True):
            assert steps == pytest.approx(expected, abs=tolerance)


def at(replies: Replies, alpha: float) -> Replies:
    """Those of `mixed` at one alpha."""
    return replies[ALPHAS.index(alpha) :: len(ALPHAS)]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("how", ["chunks", "compiled", "synchronous"])
def test_however_it_is_run_it_answers_as_fused(
    replies: dict[str, Replies], how: str, alpha: float
) -> None:
    """Prompts in chunks of a few tokens; a compiled model; vLLM's synchronous scheduler."""
    assert_alike(at(replies[how], alpha), replies[f"fused {alpha}"][: len(PROMPTS)])


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_tokens_of_a_prompt_are_scored_at_its_alpha(
    replies: dict[str, Replies], alpha: float
) -> None:
    """Also where the prompt came in chunks, together with those of other alphas."""
    theirs = replies[f"fused {alpha}"][len(PROMPTS) :]
    for how in ("chunks", "several"):
        for one, other in zip(at(replies[how], alpha), theirs, strict=True):
            expected = pytest.approx(other["prompt_logprobs"][1:], abs=TOLERANCE)
            assert one["prompt_logprobs"][1:] == expected


@pytest.mark.parametrize("alpha", ALPHAS)
def test_several_sampled_answers(replies: dict[str, Replies], alpha: float) -> None:
    """With a seed, n = 3: the same tokens as a fused engine samples."""
    assert_alike(at(replies["several"], alpha), replies[f"fused {alpha}"][len(PROMPTS) :])
    assert all(len(reply["tokens"]) == 3 for reply in replies["several"])


def test_a_batch_at_alpha_zero_has_the_plain_engines_bits(replies: dict[str, Replies]) -> None:
    """Tokens and every log-probability, of an engine that has never heard of this package."""
    for one, other in zip(replies["zeros"], replies["plain"], strict=True):
        assert one | {"cached": 0} == other | {"cached": 0}


def test_requests_that_say_nothing_get_the_configured_alpha(replies: dict[str, Replies]) -> None:
    """`alpha` of the loader's configuration."""
    assert_alike(replies["default"], replies["fused 0.3"][: len(PROMPTS)])


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_request_that_was_preempted_goes_on_at_its_alpha(
    replies: dict[str, Replies], alpha: float
) -> None:
    """The cache has room for two of the six; what is computed again is the same."""
    assert replies["preempted"][0]["preempted"] > 0
    assert_alike(at(replies["preempted"], alpha), replies[f"fused long {alpha}"])


def test_no_alpha_is_answered_from_anothers_cache(replies: dict[str, Replies]) -> None:
    """One prompt, one request after the other: hits within an alpha, none across."""
    cached = [reply["cached"] for reply in replies["shared prompt"]]
    first = [0.0, 0.3, 0.3, 0.0, -1.0, 0.3]
    assert [count > 0 for count in cached] == [False, False, True, True, False, True], cached
    for alpha, reply in zip(first, replies["shared prompt"], strict=True):
        assert_alike([reply], replies[f"fused long {alpha}"][:1])


def test_each_vector_has_an_alpha_of_its_own(replies: dict[str, Replies]) -> None:
    """In order, or by name; those that are not named are at 0."""
    count = len(PROMPTS)
    found = replies["two vectors"]
    assert_alike(found[:count], replies["fused two"])
    assert_alike(found[count : 2 * count], replies["fused two"])
    assert_alike(found[2 * count :], replies["fused second"])


def test_int8_loses_nothing_at_alpha_zero_and_little_elsewhere(
    replies: dict[str, Replies],
) -> None:
    """The target's rows never meet v; at 0.3 first tokens are off by less than 2 %."""
    assert_alike(at(replies["int8"], 0.0), replies["fused 0.0"][: len(PROMPTS)])
    for one, other in zip(at(replies["int8"], 0.3), replies["fused 0.3"], strict=False):
        assert one["logprobs"][0][0] == pytest.approx(other["logprobs"][0][0], abs=0.02)
        assert one["logprobs"] != other["logprobs"]


def test_two_ranks_answer_as_one(family: Family, tmp_path: Path) -> None:
    """Each rank of tensor parallel 2 adds what it holds, before the ranks' sums are added up."""
    jobs = Jobs(family, [make_vector(family, tmp_path / "vector")])
    ranks: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    jobs.dial("two ranks", mixed(), **ranks)
    for alpha in ALPHAS:
        jobs.fused(f"fused {alpha}", [alpha], asked(None), **ranks)
    found = jobs.run(VLLM_CPU_OMP_THREADS_BIND="0|1")
    for alpha in ALPHAS:
        assert_alike(at(found["two ranks"], alpha), found[f"fused {alpha}"])


def test_bfloat16_is_as_near_to_float32_as_a_fused_engine(family: Family, tmp_path: Path) -> None:
    """Every token of the prompts is scored.

    Both round: fused engines theta + alpha v, once for each weight; the dial its two products. In
    another batch a fused engine of this CPU build gives the same bits, so the dial is not nearer to
    it than that; it has no larger an error than it (root of the mean square, 20 % allowed).
    """
    jobs = Jobs(family, [make_vector(family, tmp_path / "vector")])
    prompts = [[(7 * i + 11 * n) % 500 + 3 for i in range(50)] for n in range(8)]
    scored: dict[str, Any] = {"prompt_logprobs": 0, "max_tokens": 1}
    jobs.dial("dial", asked(0.3, prompts, **scored), dtype="bfloat16")
    jobs.fused("fused", [0.3], asked(None, prompts, **scored), dtype="bfloat16")
    jobs.fused("other batch", [0.3], asked(None, prompts, **scored), dtype="bfloat16", batch=1)
    jobs.fused("float32", [0.3], asked(None, prompts, **scored))
    found = {name: list(_scores(replies)) for name, replies in jobs.run().items()}
    error = {name: _distance(found[name], found["float32"]) for name in found}
    assert error["dial"] < 1.2 * error["fused"], error
    assert _distance(found["dial"], found["fused"]) < 2 * error["fused"]


@pytest.mark.parametrize("when", ["online", "beforehand"])
def test_a_quantized_target_keeps_its_answers_and_gets_the_vector(
    family: Family, tmp_path: Path, when: str
) -> None:
    """FP8 while loading, or int8 on disk; v in bfloat16.

    Alpha 0 is the quantized target bit for bit. At 0.3 the answers are as far from the unquantized
    sum as the quantized target's own are from the unquantized target: the vector itself is whole.
    """
    vector = make_vector(family, tmp_path / "vector")
    jobs = Jobs(family, [vector])
    prompts = [[(7 * i + 11 * n) % 500 + 3 for i in range(50)] for n in range(8)]
    scored: dict[str, Any] = {"prompt_logprobs": 0, "max_tokens": 1}
    how: dict[str, Any] = {"dtype": "bfloat16"}
    if when == "online":
        how["quantization"] = "fp8_per_channel"
    else:
        how["model"] = str(int8_copy(family.target, tmp_path / "int8"))
    # Only who made a compressed-tensors checkpoint knows whether it rescaled its inputs.
    forced = {"force": when == "beforehand"}
    jobs.add("plain", asked(None, prompts, **scored), dict(how))
    jobs.dial("dial 0", asked(0.0, prompts, **scored), forced, **how)
    jobs.dial("dial 0.3", asked(0.3, prompts, **scored), forced, **how)
    merged = make_merged(family.target, vector, 0.3, tmp_path / "merged")
    jobs.add("sum", asked(None, prompts, **scored), {"model": str(merged)})
    jobs.add("target", asked(None, prompts, **scored), {})
    found = {name: list(_scores(replies)) for name, replies in jobs.run().items()}
    assert found["dial 0"] == found["plain"]
    own = _distance(found["plain"], found["target"])
    near, far = (_distance(found[name], found["sum"]) for name in ("dial 0.3", "plain"))
    assert near < 1.3 * own, (near, own)
    assert near < far


def _scores(replies: Replies) -> Iterator[float]:
    for reply in replies:
        yield from reply["prompt_logprobs"][1:]


def _distance(one: list[float], other: list[float]) -> float:
    pairs = zip(one, other, strict=True)
    return math.sqrt(sum((a - b) ** 2 for a, b in pairs) / len(one))
