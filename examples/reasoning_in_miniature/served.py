"""Make the README's table on real engines: sweep v, sweep its permuted control, and tabulate.

    python examples/reasoning_in_miniature/served.py

Sweeps that are complete in --work are not asked again. Writes `served.json` and `served.md`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["served_table", "tabulate"]

HERE = Path(__file__).resolve().parent

TASKS = {
    "chain": "chains",
    "chain_steps": "chains, steps begun",
    "count": "counting",
    "max": "largest",
    "other": "other kinds",
}
"""Files of tasks/, and what the table calls them."""

ROWS = {
    "-v": "alpha -1",
    "v@-0.5": "alpha -0.5",
    "base": "alpha 0, the target",
    "v@0.5": "alpha 0.5",
    "v@1": "alpha 1",
    "v@1.5": "alpha 1.5",
    "random@1": "random, of the same norms",
    "permuted@1": "v with its entries permuted",
}
"""Arms, and what the table calls them."""


def main() -> None:
    """Run what has not been run, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "work" / "served")
    parser.add_argument("--seed", type=int, default=0, help="of the permutation")
    options = parser.parse_args()
    work = options.work.resolve()
    permuted = work / "permuted"
    _sweep(work / "v")
    if not permuted.exists():
        vector, seed = str(HERE / "vector"), str(options.seed)
        _rvec("random-like", vector, "--permute", "--seed", seed, "--output", str(permuted))
    control = ("--vector", str(permuted), "--alphas", "1", "--arms", "base,vector")
    _sweep(work / "permuted-sweep", *control)
    table = tabulate(_report(work / "v"), _report(work / "permuted-sweep"))
    (HERE / "served.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    (HERE / "served.md").write_text(served_table(table), encoding="utf-8")


def tabulate(swept: dict[str, Any], control: dict[str, Any]) -> dict[str, Any]:
    """Take from two reports what the table needs.

    Args:
        swept: `report.json` of the sweep of v.
        control: that of its permuted control, whose `v@1` becomes `permuted@1`.
    """
    accuracy = _accuracy(swept) | {"permuted@1": _accuracy(control)["v@1"]}
    return {
        "verdict": swept["verdict"]["text"],
        "noise": {"answers": swept["noise"][0]["n"], "texts_differ": swept["noise"][0]["texts"]},
        "arms": [{"arm": name, "accuracy": accuracy[name]} for name in ROWS],
    }


def served_table(table: dict[str, Any]) -> str:
    """Write `served.json` as Markdown: accuracy in per cent with its 95 % Wilson interval."""
    lines = [f"| | {' | '.join(TASKS.values())} |", "| --- " * (len(TASKS) + 1) + "|"]
    for arm in table["arms"]:
        cells = (_cell(arm["accuracy"][task]) for task in TASKS)
        lines.append(f"| {ROWS[arm['arm']]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(accuracy: dict[str, Any]) -> str:
    low, high = accuracy["interval_95"]
    return f"{100 * accuracy['value']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _accuracy(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Sort a report's summaries of whole tasks by arm, and by task."""
    found: dict[str, dict[str, Any]] = {}
    for summary in report["summaries"]:
        task, family = summary["scope"]["task"], summary["scope"]["family"]
        if task and not family:
            value, interval = summary["accuracy"]["value"], summary["accuracy"]["interval"]
            found.setdefault(summary["arm"], {})[task] = {
                "correct": summary["correct"],
                "answers": summary["answers"],
                "value": round(value, 4),
                "interval_95": [round(interval["low"], 4), round(interval["high"], 4)],
                "mean_tokens": round(summary["mean_tokens"], 1),
            }
    return found


def _report(folder: Path) -> dict[str, Any]:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert isinstance(report, dict)
    return report


def _sweep(output: Path, *words: str) -> None:
    config = str(HERE / "sweep.yaml")
    _rvec("sweep", "--config", config, "--output", str(output), *words)


def _rvec(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "vllm_rvec", *words], check=True)


if __name__ == "__main__":
    main()
