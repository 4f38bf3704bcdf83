# ruff: noqa: T201 - what it prints is what the test reads
"""A process that supervises stand-in engines, to be killed in tests: `python parent.py NAME...`."""

from __future__ import annotations

import asyncio
import sys

from tests.serve.conftest import stand_in_spec
from vllm_rvec.serve import EngineProcess, Supervisor


async def main() -> None:
    """Supervise for ever; prints the engines' lines, then `all ready`."""
    specs = [stand_in_spec(name) for name in sys.argv[1:]]
    supervisor = Supervisor(
        specs,
        lambda spec: EngineProcess(spec, lambda _, line: print(line, flush=True)),
        lambda spec, state, _, engine: print(
            "state", spec.name, state, engine.guard_pid if engine else None, flush=True
        ),
    )
    await supervisor.start()
    print("all ready", flush=True)
    await supervisor.run()


if __name__ == "__main__":
    asyncio.run(main())
