"""Runs the suite in two halves side by side, `python -m tests`: with engines, and without.

Engines spend most of their time on starting and waiting, so the other tests run meanwhile.
Arguments go to both halves; for a part of the suite use pytest itself.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

NO_TESTS = 5
"""pytest's status where a half has none of the tests that were asked for."""


def main() -> int:
    """Run both, show the one while it runs and the other behind it.

    Returns:
        0 if both passed, else the status of one that didn't.
    """
    pytest = [sys.executable, "-m", "pytest", *sys.argv[1:]]
    with tempfile.TemporaryFile() as later:
        without = subprocess.Popen(
            [*pytest, "-m", "not engine"], cwd=ROOT, stdout=later, stderr=subprocess.STDOUT
        )
        try:
            sys.stdout.write("with engines; those without run beside them and are shown behind\n")
            sys.stdout.flush()
            statuses = [subprocess.call([*pytest, "-m", "engine"], cwd=ROOT), without.wait()]
        finally:
            without.terminate()
            without.wait()
        later.seek(0)
        sys.stdout.write(later.read().decode(errors="replace"))
    failed = [status for status in statuses if status not in {0, NO_TESTS}]
    nothing_ran = statuses == [NO_TESTS, NO_TESTS]
    return failed[0] if failed else NO_TESTS * nothing_ran


if __name__ == "__main__":
    sys.exit(main())
