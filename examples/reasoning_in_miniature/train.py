"""Train the demo's model from nothing: `python examples/reasoning_in_miniature/train.py`.

Stages, in order; each starts from the bf16-rounded weights of the one it follows, and a stage
whose folder is complete in --work is skipped:

    tokenizer > pretrain > midtrain (theta_0) > sft (theta_SFT) > grpo (theta_GRPO)
                                              > target (theta_target)
    then evaluate, export (target and donors, as committed) and vector (theta_GRPO - theta_SFT)

This module holds the plan and the files. The subjects have modules of their own: `tasks`,
`chat_tokenizer`, `supervised`, `grpo`, `gradients`, `sampling`, `vectors`, `evaluation`,
`model_card`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from chat_tokenizer import (
    END_OF_TEXT,
    END_OF_TURN,
    VOCABULARY_SIZE,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from evaluation import Models, evaluate
from grpo import GrpoPlan
from grpo import train as train_grpo
from model_card import Training, model_card
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from sampling import ask, score
from supervised import SupervisedPlan, draw_texts
from supervised import train as train_supervised
from tasks import REASONING_FAMILIES, Family, draw_distinct
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from vllm_rvec.vector.extract import extract

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent

PLANS: dict[str, SupervisedPlan | GrpoPlan] = {
    "pretrain": SupervisedPlan(1400, 64, 3e-3, 50, ("S", "T"), 0.15, 0.0, 0.7),
    "midtrain": SupervisedPlan(400, 64, 1e-3, 10, ("S", "T"), 0.15, 0.7, 0.7),
    "sft": SupervisedPlan(60, 32, 2e-4, 5, ("S",), 0.10, 1.0, None),
    "target": SupervisedPlan(60, 32, 2e-4, 5, ("T",), 0.50, 1.0, None),
    "grpo": GrpoPlan(30, 18, 16, 1e-4, 1.0, "S"),
}
"""Steps, batch sizes, learning rates and mixtures."""

STARTS_FROM = {"midtrain": "pretrain", "sft": "midtrain", "target": "midtrain", "grpo": "sft"}

STAGES = ("tokenizer", *PLANS, "evaluate", "export", "vector")

BASE_THRESHOLDS: dict[Family, float] = {"chain": 0.75, "count": 0.6, "max": 0.6}
"""Accuracy, made to write its steps, below which theta_0 is not worth tuning."""

EXPORTS = {"target": Path("target"), "sft": Path("donors/sft"), "grpo": Path("donors/grpo")}
"""Stages whose checkpoints are committed, and where."""

QUESTION_COUNT = 200


class BaseNotLearnedError(RuntimeError):
    """Pretraining did not reach `BASE_THRESHOLDS`: nothing after it would mean anything."""


@dataclass(frozen=True, slots=True)
class Run:
    """Where one training run reads and writes, and its seed."""

    work: Path
    output: Path
    seed: int
    pool: Executor
    threads: int
    console: Console

    def folder(self, stage: str) -> Path:
        """The stage's checkpoint folder in --work."""
        return self.work / stage

    def rng(self, purpose: str) -> random.Random:
        """A generator of its own for each purpose, so that a resumed run draws the same."""
        return random.Random(f"{self.seed} {purpose}")


def main() -> None:
    """Run every stage, or the one named by --only."""
    options = _parse_arguments()
    torch.set_num_threads(1)  # the pool's threads do one slice each: see gradients.py
    disable_progress_bar()
    stages = STAGES if options.only is None else (options.only,)
    with ThreadPoolExecutor(options.threads) as pool:
        run = Run(options.work, options.output, options.seed, pool, options.threads, Console())
        try:
            for stage in stages:
                run_stage(run, stage)
        except BaseNotLearnedError as error:
            sys.exit(f"train.py: {error}")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo's model and its donors.")
    parser.add_argument("--output", type=Path, default=HERE, help="what is committed goes here")
    parser.add_argument(
        "--work",
        type=Path,
        default=HERE.parents[1] / "work" / "demo",
        help="checkpoints of the stages, not committed",
    )
    parser.add_argument("--threads", type=int, default=2, help="threads; no result depends on them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=STAGES, help="run this stage alone")
    return parser.parse_args()


def run_stage(run: Run, stage: str) -> None:
    """Train a stage unless it is there, or do what comes after the training."""
    if stage in PLANS:
        if not _is_complete(run, stage):
            _train_stage(run, stage)
        if stage == "midtrain":
            _check_base(run)
        return
    actions: dict[str, Callable[[Run], None]] = {
        "tokenizer": _make_tokenizer,
        "evaluate": _evaluate,
        "export": _export,
        "vector": extract_vector,
    }
    actions[stage](run)


def extract_vector(run: Run) -> None:
    """Store theta_GRPO - theta_SFT as `vector/` with the package's own `extract`, in bf16.

    From the exported donors, so that anyone who has them can repeat it. In bf16 because
    `results.json` is measured with v rounded so, and to be half the size.
    """
    output = run.output / "vector"
    if output.exists():
        shutil.rmtree(output)
    tuned, base = (run.output / EXPORTS[stage] for stage in ("grpo", "sft"))
    extract(tuned=tuned, base=base, output=output, dtype="bfloat16")


def _make_tokenizer(run: Run) -> None:
    folder = run.folder("tokenizer")
    if (folder / "tokenizer_config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    plan = PLANS["pretrain"]
    assert isinstance(plan, SupervisedPlan)
    save_tokenizer(train_tokenizer(draw_texts(run.rng("tokenizer"), plan, 8000)), folder)


def _train_stage(run: Run, stage: str) -> None:
    """Train one stage and save it; `stage.json` is written last and marks it complete."""
    tokenizer = load_tokenizer(run.folder("tokenizer"))
    model = _initial_model(run, tokenizer, stage)
    plan = PLANS[stage]
    begin = time.perf_counter()
    with _progress(run.console) as progress:
        task = progress.add_task(stage, total=plan.steps, note="")
        figures: list[float] = []

        def on_step(figure: float) -> None:
            figures.append(figure)
            name = "loss" if isinstance(plan, SupervisedPlan) else "reward"
            progress.update(task, advance=1, note=f"{name} {figure:.3f}")
            if len(figures) % max(1, plan.steps // 10) == 0:
                progress.console.print(f"{stage} step {len(figures)} {name} {figure:.3f}")

        rng = run.rng(stage)
        if isinstance(plan, SupervisedPlan):
            train_supervised(model, tokenizer, plan, rng=rng, pool=run.pool, on_step=on_step)
        else:
            train_grpo(model, tokenizer, plan, rng=rng, pool=run.pool, on_step=on_step)
    _save_model(model, tokenizer, run.folder(stage))
    record = {
        "stage": stage,
        "seed": run.seed,
        "plan": asdict(plan),
        "train_seconds": round(time.perf_counter() - begin, 1),
        "threads": run.threads,
        "figures": [round(figure, 4) for figure in figures],
    }
    _write_json(run.folder(stage) / "stage.json", record)


def _check_base(run: Run) -> None:
    """Fail unless theta_0, made to write its steps, solves each reasoning family."""
    tokenizer, model = load_tokenizer(run.folder("tokenizer")), load_model(run.folder("midtrain"))
    found: dict[Family, float] = {}
    for family in REASONING_FAMILIES:
        problems = draw_distinct(run.rng(f"check {family}"), [family], "S", "held_out", 128)
        replies = ask(model, tokenizer, problems, pool=run.pool, is_forced_to_work=True)
        grades = [score(reply, problem) for reply, problem in zip(replies, problems, strict=True)]
        found[family] = sum(grades) / len(grades)
    run.console.print("theta_0, made to write its steps:", found)
    missed = {f: found[f] for f, least in BASE_THRESHOLDS.items() if found[f] < least}
    if missed:
        raise BaseNotLearnedError(
            f"theta_0 solves too little of {missed} (needed: {BASE_THRESHOLDS}); "
            f"delete {run.work} and train with another --seed or more pretraining steps"
        )


def _evaluate(run: Run) -> None:
    """Measure target + alpha * v; write `results.json`."""
    tokenizer = load_tokenizer(run.folder("tokenizer"))
    target, tuned, base = (load_model(run.folder(s)) for s in ("target", "grpo", "sft"))
    evaluation = evaluate(
        Models(target, tuned, base, tokenizer), seed=run.seed, pool=run.pool, console=run.console
    )
    records = {stage: _read_json(run.folder(stage) / "stage.json") for stage in PLANS}
    training = Training(
        seed=run.seed,
        threads=int(records["pretrain"]["threads"]),
        parameters=sum(parameter.numel() for parameter in target.parameters()),
        train_seconds={stage: float(record["train_seconds"]) for stage, record in records.items()},
        plans={stage: asdict(plan) for stage, plan in PLANS.items()},
    )
    run.output.mkdir(parents=True, exist_ok=True)
    _write_json(run.output / "results.json", {**asdict(evaluation), "training": asdict(training)})


def _export(run: Run) -> None:
    """Copy target and donors with their cards, and write questions for your own client."""
    results = _read_json(run.output / "results.json")
    for stage, place in EXPORTS.items():
        folder = run.output / place
        folder.mkdir(parents=True, exist_ok=True)
        for name in (
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ):
            shutil.copyfile(run.folder(stage) / name, folder / name)
        (folder / "README.md").write_text(model_card(stage, results), encoding="utf-8")
    problems = draw_distinct(run.rng("questions"), ["chain"], "T", "held_out", QUESTION_COUNT)
    lines = [json.dumps({"question": p.question, "answer": p.answer}) for p in problems]
    path = run.output / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _initial_model(run: Run, tokenizer: Tokenizer, stage: str) -> Qwen2ForCausalLM:
    if stage in STARTS_FROM:
        return load_model(run.folder(STARTS_FROM[stage]))
    torch.manual_seed(run.seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.04,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.token_to_id(END_OF_TURN),
            pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
        )
    )


def _save_model(model: Qwen2ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a Hugging Face checkpoint in bf16. This is where a stage's weights are rounded."""
    model.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def load_model(folder: Path) -> Qwen2ForCausalLM:
    """Read a stage's bf16 weights into a float32 model."""
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model, Qwen2ForCausalLM)
    return model.eval()


def _is_complete(run: Run, stage: str) -> bool:
    """Whether --work has this stage; refuses one that another seed, plan or start has made."""
    path = run.folder(stage) / "stage.json"
    if not path.exists():
        return False
    record = _read_json(path)
    expected = json.loads(json.dumps(asdict(PLANS[stage])))
    if record["seed"] != run.seed or record["plan"] != expected:
        sys.exit(f"train.py: {path.parent} was made with another seed or plan; delete it")
    parent = run.folder(STARTS_FROM.get(stage, stage)) / "stage.json"
    if path.stat().st_mtime < parent.stat().st_mtime:
        sys.exit(f"train.py: {path.parent} is older than {parent.parent}, its start; delete it")
    run.console.print(f"{stage}: already in {path.parent}")
    return True


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def _read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
