"""The whole table, `make bench`: every row with a goal, from one set of files.

Ends with status 1 where a row is a regression (`benchmarks.frame` says when). `--only` takes some
of the benchmarks; each is a module of this package that runs alone, too.
"""

from __future__ import annotations

import importlib
import sys

from rich.console import Console

from benchmarks.files import Files
from benchmarks.frame import Row, parser, report

BENCHMARKS = (
    # Those that import neither torch nor vllm here come first: their children start small.
    "cold_load",
    "peak_memory",
    "first_load",
    "merge_beside",
    "load_time",
    "engine_speed",
)


def main() -> None:
    """Make the files, run each benchmark, print one table."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS)
    options = options_parser.parse_args()
    console, rows = Console(stderr=True), list[Row]()
    with Files.asked_for(options) as files:
        for name in options.only:
            console.print(f"measuring: {name}")
            rows += importlib.import_module(f"benchmarks.{name}").measure(files, options.repeats)
    sys.exit(report(rows, as_json=options.json, title=files.title))


if __name__ == "__main__":
    main()
