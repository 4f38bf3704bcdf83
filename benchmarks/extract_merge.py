"""Extract beside cp, merge beside mergekit: seconds, bytes a second, peak memory.

Run by `make bench-merge`. Three checkpoints of Qwen2-0.5B's shape (1 GB each) and their vectors are
made in a temporary folder (8 GB in all), so the page cache is warm where it has room for them. Each
program is a child process of its own and runs in turn with the others; the median of the rounds
counts. What a program reads and writes is counted by the size of the files.

Goals: extract moves bytes at half the speed of cp or more, in at most twice the largest tensor plus
300 MB; merge takes a fifth of mergekit's time or less, in a quarter of its memory. Ours waits until
the disk has all of it; mergekit and plain cp do not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

# No torch here, and nothing that imports it: a child's peak is never reported below what its parent
# had when it started it (Linux counts the moment before exec).

MAKE = """
import sys
from pathlib import Path
from benchmarks.checkpoints import make_checkpoints
from vllm_rvec.vector.extract import extract
folder = Path(sys.argv[1])
make_checkpoints(folder, int(sys.argv[2]), ("base", "tuned", "target"))
donors = folder / "tuned", folder / "base"
extract(*donors, folder / "dense", encoding="dense")
extract(*donors, folder / "auto")
"""

TIMED = """
import sys, time
from pathlib import Path
{imports}
started = time.perf_counter()
{call}
print("seconds", time.perf_counter() - started)
"""

EXTRACT = TIMED.format(
    imports="from vllm_rvec.vector.extract import extract",
    call="extract(*map(Path, sys.argv[1:4]), encoding=sys.argv[4], dtype=sys.argv[5])",
)
MERGE = TIMED.format(
    imports="from vllm_rvec.vector.merge import merge",
    call="merge(Path(sys.argv[1]), [Path(sys.argv[2])], Path(sys.argv[3]))",
)
MERGEKIT = TIMED.format(
    imports="import json\n"
    "from mergekit.config import MergeConfiguration\n"
    "from mergekit.merge import run_merge\n"
    "from mergekit.options import MergeOptions",
    call="config = MergeConfiguration.model_validate(json.loads(sys.argv[1]))\n"
    "run_merge(config, sys.argv[2], MergeOptions(copy_tokenizer=False, quiet=True))",
)

COPY, DURABLE_COPY = "cp", "cp, then sync"
EXTRACTS = {
    "extract (float32, auto)": ("auto", "float32"),
    "extract (float32, dense)": ("dense", "float32"),
    "extract (bfloat16, dense)": ("dense", "bfloat16"),
}
MERGE_DENSE, MERGE_AUTO = "merge (dense vector)", "merge (auto vector)"
KIT = "mergekit task_arithmetic"

NO_MERGEKIT = "not measured: make mergekit"


@dataclass(slots=True)
class Way:
    """One program, and what was measured of it."""

    command: list[str]
    """Its last argument is the output, which must not exist."""
    reads: list[Path]
    output: Path
    seconds: list[float] = field(default_factory=list)
    """Of the work alone: without starting Python and importing torch."""
    process_seconds: list[float] = field(default_factory=list)
    """From start to end."""
    peak_bytes: int = 0
    moved_bytes: int = 0
    """Read and written."""

    def run(self) -> None:
        """Run it once in a child process, and remove what it made."""
        started = time.perf_counter()
        child = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = child.stdout, child.stderr
        assert out is not None
        assert err is not None
        text, errors = out.read().decode(), err.read().decode()
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise RuntimeError(f"{self.command[:2]} failed:\n{errors}")
        found = [line.split()[1] for line in text.splitlines() if line.startswith("seconds ")]
        self.process_seconds.append(seconds)
        self.seconds.append(float(found[-1]) if found else seconds)
        self.peak_bytes = max(self.peak_bytes, usage.ru_maxrss * 1024)
        self.moved_bytes = sum(map(_size_of, (*self.reads, self.output)))
        shutil.rmtree(self.output)

    @property
    def median_seconds(self) -> float:
        """Of all rounds, of the work alone."""
        return statistics.median(self.seconds)

    @property
    def bytes_per_second(self) -> float:
        """Read and written, at the median time."""
        return self.moved_bytes / self.median_seconds


def main() -> None:
    """Make the files, measure each way in turn, print ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=2, help="rounds; the median counts")
    parser.add_argument("--layers", type=int, default=24, help="24 is Qwen2-0.5B")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rvec-bench-") as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-c", MAKE, name, str(options.layers)], check=True)
        os.sync()  # the disk's own work is over before anything is measured
        ways = _ways(folder)
        for _ in track(range(options.repeats), "measuring", console=Console(stderr=True)):
            for way in ways.values():
                way.run()
        largest_bytes = _largest_tensor_bytes(folder / "target" / "model.safetensors")
    facts = _facts(ways, largest_bytes)
    if options.json:
        json.dump(facts, sys.stdout, indent=1)
    else:
        _report(ways, facts)


def _ways(folder: Path) -> dict[str, Way]:
    tuned, base, target, out = (folder / name for name in ("tuned", "base", "target", "out"))
    copy = f"cp -r {target} {out}"

    def ours(script: str, *arguments: object) -> list[str]:
        return [sys.executable, "-c", script, *map(str, arguments)]

    ways = {
        COPY: Way(copy.split(), [target], out),
        DURABLE_COPY: Way(["bash", "-c", f"{copy} && sync {out}/*"], [target], out),
    }
    for name, how in EXTRACTS.items():
        ways[name] = Way(ours(EXTRACT, tuned, base, out, *how), [tuned, base], out)
    for name, vector in ((MERGE_DENSE, folder / "dense"), (MERGE_AUTO, folder / "auto")):
        ways[name] = Way(ours(MERGE, target, vector, out), [target, vector], out)
    if kit := mergekit_way(tuned, base, target, out):
        ways[KIT] = kit
    return ways


def mergekit_way(tuned: Path, base: Path, target: Path, out: Path) -> Way | None:
    """Return mergekit's way to add tuned - base to a target; None where it is not installed."""
    python = Path(os.environ.get("MERGEKIT_ENV") or ".venv-mergekit") / "bin" / "python"
    if not python.exists():
        return None
    recipe = _recipe(tuned, base, target)
    return Way(
        [str(python.absolute()), "-c", MERGEKIT, recipe, str(out)], [tuned, base, target], out
    )


def _recipe(tuned: Path, base: Path, target: Path) -> str:
    """Ask mergekit for the same numbers: float32 sums, written as bf16."""
    parameters = {"weight": 1.0}
    models = [{"model": str(folder), "parameters": parameters} for folder in (tuned, target)]
    return json.dumps(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(base),
            "models": models,
            "dtype": "float32",
            "out_dtype": "bfloat16",
        }
    )


def _facts(ways: dict[str, Way], largest_bytes: int) -> dict[str, object]:
    facts: dict[str, object] = {
        "largest_tensor_bytes": largest_bytes,
        "extract_memory_goal_bytes": 2 * largest_bytes + 300_000_000,
        "ways": {
            name: {
                "seconds": way.seconds,
                "process_seconds": way.process_seconds,
                "bytes_per_second": way.bytes_per_second,
                "speed_beside_cp": way.bytes_per_second / ways[COPY].bytes_per_second,
                "speed_beside_durable_cp": way.bytes_per_second
                / ways[DURABLE_COPY].bytes_per_second,
                "peak_bytes": way.peak_bytes,
            }
            for name, way in ways.items()
        },
        "mergekit": NO_MERGEKIT,
    }
    if KIT in ways:
        facts["mergekit"] = {
            name: _beside(ways[name], ways[KIT]) for name in (MERGE_DENSE, MERGE_AUTO)
        }
    return facts


def _beside(ours: Way, theirs: Way) -> dict[str, float]:
    # Ratios within one round: rounds differ on a shared machine, neighbours in a round hardly.
    rounds = zip(theirs.seconds, ours.seconds, strict=True)
    processes = zip(theirs.process_seconds, ours.process_seconds, strict=True)
    return {
        "times_faster": statistics.median(kit / own for kit, own in rounds),
        "times_faster_with_start": statistics.median(kit / own for kit, own in processes),
        "share_of_memory": ours.peak_bytes / theirs.peak_bytes,
    }


def _report(ways: dict[str, Way], facts: dict[str, object]) -> None:
    table = Table(title="three bf16 checkpoints of one shape, medians")
    table.add_column("way", no_wrap=True)
    for column in ("s", "s with start", "MB/s", "of cp", "of synced cp", "peak MB"):
        table.add_column(column, justify="right")
    for name, way in ways.items():
        table.add_row(
            name,
            f"{way.median_seconds:.2f}",
            f"{statistics.median(way.process_seconds):.2f}",
            f"{way.bytes_per_second / 1e6:,.0f}",
            *(
                f"{way.bytes_per_second / ways[copy].bytes_per_second:.2f}"
                for copy in (COPY, DURABLE_COPY)
            ),
            f"{way.peak_bytes / 1e6:,.0f}",
        )
    console = Console(width=100)
    console.print(table)
    goal = facts["extract_memory_goal_bytes"]
    assert isinstance(goal, int)
    console.print(f"extract's goal: half of cp's MB/s, at most {goal / 1e6:,.0f} MB")
    _report_mergekit(console, facts["mergekit"])


def _report_mergekit(console: Console, beside: object) -> None:
    if not isinstance(beside, dict):
        console.print(f"{KIT}: {beside}")
        return
    for name, ratios in beside.items():
        console.print(
            f"{name}: {ratios['times_faster']:.1f} times faster than mergekit "
            f"({ratios['times_faster_with_start']:.1f} with the start of both programs), "
            f"{ratios['share_of_memory']:.0%} of its memory (goal: 5 times, 25%)"
        )


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _largest_tensor_bytes(shard: Path) -> int:
    with shard.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    offsets = [entry["data_offsets"] for entry in header.values()]
    return max(int(end) - int(start) for start, end in offsets)


if __name__ == "__main__":
    main()
