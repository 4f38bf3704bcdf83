"""The miniature's training: what it draws, its gradient and rewards, its stages, its files."""

from __future__ import annotations

import dataclasses
import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console

from tests.support.miniature import MINIATURE, miniature_module
from vllm_rvec.vector.extract import extract

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Executor
    from pathlib import Path

train = miniature_module("train")
evaluation = miniature_module("evaluation")
gradients = miniature_module("gradients")
grpo = miniature_module("grpo")
model_card = miniature_module("model_card")
sampling = miniature_module("sampling")
supervised = miniature_module("supervised")
tasks = miniature_module("tasks")
vectors = miniature_module("vectors")

RESULTS = json.loads((MINIATURE / "results.json").read_text(encoding="utf-8"))
SEED = RESULTS["training"]["seed"]


def _training_keys(stage: str) -> set[str]:
    """Draw again every problem that a stage trained on, from its seed."""
    plan, rng = train.PLANS[stage], random.Random(f"{SEED} {stage}")  # noqa: S311
    keys: set[str] = set()
    for _ in range(plan.steps):
        if isinstance(plan, supervised.SupervisedPlan):
            keys.update(line.problem.key for line in supervised.draw_batch(rng, plan))
        else:
            keys.update(problem.key for problem in grpo.draw_step(rng, plan)[0])
    return keys


@pytest.fixture(scope="module")
def evaluated_keys() -> set[str]:
    """Whatever is asked for a published figure, on either road."""
    drawn = evaluation.draw_problems(SEED)
    files = (MINIATURE / "tasks").glob("*.jsonl")
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    keys = {problem.key for problems in drawn.values() for problem in problems}
    assert {line["id"] for line in lines} == keys
    return keys


@pytest.mark.parametrize("stage", train.PLANS)
def test_no_evaluated_problem_was_trained_on(stage: str, evaluated_keys: set[str]) -> None:
    """Every draw of every stage is drawn again, and none of its keys is among the evaluated."""
    keys = _training_keys(stage)
    assert len(keys) > 100
    assert not keys & evaluated_keys


def test_the_plans_are_those_that_the_results_come_from() -> None:
    """So that the draws above are the draws of the training."""
    assert list(RESULTS["training"]["train_seconds"]) == list(train.PLANS)
    assert RESULTS["training"]["plans"] == json.loads(
        json.dumps({stage: dataclasses.asdict(plan) for stage, plan in train.PLANS.items()})
    )


@pytest.fixture
def pool() -> Iterator[Executor]:
    """Two threads."""
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.fixture(scope="module")
def target() -> Any:
    """The committed target in float32."""
    return train.load_model(MINIATURE / "target")


def test_the_gradient_is_the_same_on_any_number_of_threads(target: Any) -> None:
    """Slices are added up in their order, whichever thread has them."""
    generator = torch.Generator().manual_seed(0)
    slices = [
        (torch.randint(300, (4, 20), generator=generator), torch.rand(4, 20, generator=generator))
        for _ in range(5)
    ]
    found = []
    for threads in (1, 2):
        with ThreadPoolExecutor(threads) as workers:
            gradients.set_gradient(target, slices, workers)
        found.append([parameter.grad.clone() for parameter in target.parameters()])
    target.zero_grad()
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_advantages_are_standardised_within_each_group() -> None:
    """A group of equal rewards teaches nothing; any other has mean 0 and deviation 1."""
    rewards = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    found = grpo.advantages(rewards)
    assert torch.equal(found[0], torch.zeros(4))
    assert found[1].mean().item() == pytest.approx(0, abs=1e-6)
    assert found[1].std().item() == pytest.approx(1, abs=1e-3)


def test_sampled_replies_do_not_depend_on_the_threads(target: Any) -> None:
    """Each batch has a generator of its own."""
    tokenizer = train.load_tokenizer(MINIATURE / "target")
    prompts = [tokenizer.encode(f"Start with {n}. Add 5.\n").ids for n in range(10, 99)] * 2
    found = []
    for threads in (1, 2):
        with ThreadPoolExecutor(threads) as workers:
            replies = sampling.generate(
                target, tokenizer, prompts, pool=workers, temperature=1.0, seed=3
            )
        found.append([reply.token_ids for reply in replies])
    assert found[0] == found[1]


def test_controls_keep_what_they_should_of_the_vector() -> None:
    """The random one each tensor's norm; the permuted one its very values, in other places."""
    vector = {"a": torch.randn(30, 20), "b": torch.randn(50)}
    noise, shuffled = vectors.random_like(vector, 0), vectors.permuted(vector, 0)
    for name, tensor in vector.items():
        assert noise[name].norm().item() == pytest.approx(tensor.norm().item(), rel=1e-5)
        assert torch.equal(shuffled[name].flatten().sort()[0], tensor.flatten().sort()[0])
        assert not torch.equal(shuffled[name], tensor)


def test_alpha_zero_is_the_target_bit_for_bit(target: Any) -> None:
    """Fusing rounds nothing where there is nothing to add."""
    vector = {name: torch.ones_like(p) for name, p in vectors.parameters(target).items()}
    same, moved = (vectors.fused(target, vector, alpha) for alpha in (0.0, 1.0))
    pairs = zip(target.parameters(), same.parameters(), moved.parameters(), strict=True)
    for parameter, kept, changed in pairs:
        assert torch.equal(parameter, kept)
        assert not torch.equal(parameter, changed)


def test_extract_of_the_committed_donors_is_the_committed_vector(tmp_path: Path) -> None:
    """Bit for bit; of the manifest all but the hour."""
    donors = MINIATURE / "donors"
    extract(tuned=donors / "grpo", base=donors / "sft", output=tmp_path / "v", dtype="bfloat16")
    made, committed = (
        json.loads((folder / "vector.json").read_text(encoding="utf-8"))
        for folder in (tmp_path / "v", MINIATURE / "vector")
    )
    for name in ("created", "digest"):  # the digest is of the hour too
        assert made.pop(name) != committed.pop(name)
    assert made == committed
    for name in committed["files"]:
        assert (tmp_path / "v" / name).read_bytes() == (MINIATURE / "vector" / name).read_bytes()


@pytest.mark.parametrize("stage", train.EXPORTS)
def test_cards_say_what_results_say(stage: str) -> None:
    """Each card is what `train.py` writes from results.json, and says elicitation."""
    text = (MINIATURE / train.EXPORTS[stage] / "README.md").read_text(encoding="utf-8")
    assert text == model_card.model_card(stage, RESULTS)
    assert "elicitation" in text or "no\nreinforcement learning" in text


def test_task_files_are_what_their_script_writes() -> None:
    """Deterministic, from the seed alone."""
    for name, lines in miniature_module("task_files").task_files(SEED).items():
        text = (MINIATURE / "tasks" / f"{name}.jsonl").read_text(encoding="utf-8")
        assert [json.loads(line) for line in text.splitlines()] == lines


def test_the_served_table_is_what_was_served() -> None:
    """served.md is served.json in words, one row for each arm and every task."""
    served = miniature_module("served")
    table = json.loads((MINIATURE / "served.json").read_text(encoding="utf-8"))
    assert served.served_table(table) == (MINIATURE / "served.md").read_text(encoding="utf-8")
    assert [arm["arm"] for arm in table["arms"]] == list(served.ROWS)


@pytest.mark.parametrize(
    ("served_arm", "arm"),
    [
        ("-v", "alpha -1"),
        ("v@-0.5", "alpha -0.5"),
        ("base", "alpha 0"),
        ("v@0.5", "alpha 0.5"),
        ("v@1", "alpha 1"),
        ("v@1.5", "alpha 1.5"),
    ],
)
def test_engines_answer_as_transformers_do(served_arm: str, arm: str) -> None:
    """Each figure of results.json is within the interval of the served one."""
    table = json.loads((MINIATURE / "served.json").read_text(encoding="utf-8"))
    (served,) = (one["accuracy"] for one in table["arms"] if one["arm"] == served_arm)
    (measured,) = (one["accuracy"] for one in RESULTS["arms"] if one["name"] == arm)
    for group, accuracy in measured.items():
        low, high = served[group]["interval_95"]
        assert low <= accuracy["accuracy"] <= high
        assert served[group]["answers"] == accuracy["asked"]


GROUPS = dict(evaluation.GROUPS)
TINY = {"steps": 2, "batch_size": 4, "prompts_per_step": 3, "samples_per_prompt": 4}


@pytest.fixture
def tiny_run(tmp_path: Path, pool: Executor, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run of two steps a stage that passes any check of its base."""
    for stage, plan in list(train.PLANS.items()):
        known = {field.name for field in dataclasses.fields(plan)}
        cut = {name: value for name, value in TINY.items() if name in known}
        monkeypatch.setitem(train.PLANS, stage, dataclasses.replace(plan, **cut))
    monkeypatch.setattr(train, "BASE_THRESHOLDS", {})
    monkeypatch.setattr(sampling, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(
        evaluation, "GROUPS", {group: (families, 4) for group, (families, _) in GROUPS.items()}
    )
    return train.Run(tmp_path / "work", tmp_path / "out", 0, pool, 2, Console(quiet=True))


def test_a_whole_run_leaves_what_is_committed(tiny_run: Any) -> None:
    """Every file of target and donors, a vector and the results."""
    for stage in train.STAGES:
        train.run_stage(tiny_run, stage)
    committed = {
        path.relative_to(MINIATURE)
        for place in train.EXPORTS.values()
        for path in (MINIATURE / place).iterdir()
    }
    made = {path.relative_to(tiny_run.output) for path in tiny_run.output.rglob("*")}
    # Two steps of RL change nothing: this vector has no data.
    assert committed | {train.Path("vector/vector.json"), train.Path("results.json")} <= made


def test_a_run_is_resumed_by_stage(tiny_run: Any) -> None:
    """What is complete is not trained again."""
    marks = []
    for _ in range(2):
        for stage in ("tokenizer", "pretrain", "midtrain", "sft"):
            train.run_stage(tiny_run, stage)
        paths = sorted(tiny_run.work.rglob("stage.json"))
        marks.append([path.stat().st_mtime_ns for path in paths])
    assert len(marks[0]) == 3
    assert marks[0] == marks[1]


def test_a_base_that_has_not_learned_stops_the_run(
    tiny_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before SFT, with what was found and what to do."""
    monkeypatch.setattr(train, "BASE_THRESHOLDS", {"chain": 0.75})
    for stage in ("tokenizer", "pretrain"):
        train.run_stage(tiny_run, stage)
    with pytest.raises(train.BaseNotLearnedError, match=r"too little of .*chain.*--seed"):
        train.run_stage(tiny_run, "midtrain")


def test_a_stage_of_another_seed_is_refused(tiny_run: Any) -> None:
    """Rather than mixed with this run's."""
    for stage in ("tokenizer", "pretrain"):
        train.run_stage(tiny_run, stage)
    with pytest.raises(SystemExit, match="another seed or plan"):
        train.run_stage(dataclasses.replace(tiny_run, seed=1), "pretrain")
