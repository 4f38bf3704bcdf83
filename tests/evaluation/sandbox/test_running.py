"""The sandbox: what passes, what doesn't, what code can't do in it, and that nothing stays behind.

Every layer is also tried alone: where a kernel refuses one, the others must do.
"""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.support.processes import until
from vllm_rvec.errors import ConfigError
from vllm_rvec.evaluation.sandbox import running
from vllm_rvec.evaluation.sandbox.running import Layer, Limits, Outcome, isolation, run_tests

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

AMPLE = Limits(wall_seconds=20, cpu_seconds=10)
"""For what ends by itself, on a machine that is busy."""
BRIEF = Limits(wall_seconds=0.4, cpu_seconds=1)
"""For what does not."""
PASSES = "assert f() == 1"
RIGHT = "def f(): return 1\n"
ALL = frozenset(Layer)
MARK = "rvec-test-left-behind"


def ran(
    program: str,
    tests: str = PASSES,
    layers: Collection[Layer] = ALL,
    limits: Limits = AMPLE,
) -> Outcome:
    return run_tests(program, tests, limits, layers=layers)


@functools.cache
def given() -> frozenset[Layer]:
    return isolation()


def needs(layer: Layer) -> None:
    if layer not in given():
        pytest.skip(f"this kernel refuses {layer}")


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process of a sandbox, and none of its folders, outlives a test; other runs have theirs."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield
        assert not left_behind()
        assert not list(Path(folder).iterdir())


def left_behind(folder: Path | None = None) -> list[psutil.Process]:
    """List what sandboxes below a folder have left: their environment is inherited by forks."""
    above, found = str(folder or tempfile.gettempdir()), []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            is_ours = running.MARKER in environment and environment["TMPDIR"].startswith(above)
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_right_code_passes() -> None:
    """Code whose tests hold passes, and has no note."""
    outcome = ran(RIGHT)
    assert outcome.is_passed
    assert outcome.note == ""


def test_wrong_code_fails_with_its_exception() -> None:
    """The note is the exception that the tests raised."""
    assert ran("def f(): return 2", "assert f() == 1, 'not one'").note == "AssertionError: not one"
    assert ran("def f(: pass").note.startswith("SyntaxError: ")
    assert ran("x = 1").note == "NameError: name 'f' is not defined"


def test_this_kernel_gives_a_network_barrier() -> None:
    """Where tests are run, at least one layer of the kernel's own cuts the network off."""
    assert given() & {Layer.NAMESPACES, Layer.SECCOMP}


@pytest.mark.parametrize("layers", [ALL, ()])
@pytest.mark.parametrize(
    "ending",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "import os, sys; sys.stdout.write('passed'); os._exit(0)",
        "import os; os.close(3); os.close(4); os._exit(0)",
        "import atexit, os; atexit.register(print); os._exit(0)",
        "import os, signal; signal.raise_signal(signal.SIGKILL)",
    ],
)
def test_ending_early_does_not_pass(ending: str, layers: Collection[Layer]) -> None:
    """Only the harness says that tests ran to their end: status 0 alone is no pass."""
    outcome = ran(f"{RIGHT}{ending}", layers=layers)
    assert not outcome.is_passed
    assert outcome.note


def test_a_forged_verdict_does_not_pass() -> None:
    """Code that finds the harness's pipe and writes into it before the tests does not pass."""
    forged = (
        "import os\nfor n in range(3, 64):\n  try: os.write(n, b'P' * 33)\n  except OSError: 0\n"
    )
    outcome = ran(f"{forged}os._exit(0)")
    assert not outcome.is_passed
    assert outcome.note == "wrote into the harness's pipe"


@pytest.mark.parametrize(
    "patch",
    [
        "import builtins; builtins.compile = builtins.exec = lambda *_, **__: None",
        "import os; os.write = os.read = os._exit = lambda *_: None",
        "import sys; sys.modules.clear(); sys.settrace(lambda *_: None)",
        "AssertionError = KeyError\nimport builtins\nbuiltins.AssertionError = ZeroDivisionError",
        "import json; json.dumps = lambda *_: 'x'",
    ],
)
def test_changing_the_interpreter_does_not_make_wrong_code_pass(patch: str) -> None:
    """What the harness uses after the code ran, it has taken before."""
    assert not ran(f"def f(): return 2\n{patch}").is_passed


@pytest.mark.parametrize("layers", [ALL, ()])
def test_code_that_hangs_is_killed(layers: Collection[Layer]) -> None:
    """Endless loops and sleeps end at the limit, and are said to have timed out."""
    for endless in ("while True: pass", "import time; time.sleep(100)"):
        began = time.monotonic()
        assert ran(endless, layers=layers, limits=BRIEF).note == "timed out"
        assert time.monotonic() - began < 5


def test_time_on_the_processor_is_limited() -> None:
    """A busy loop ends by its own limit, before the wall clock's."""
    began = time.monotonic()
    limits = Limits(wall_seconds=30, cpu_seconds=1)
    assert run_tests("while True: pass", PASSES, limits).note in {"timed out", "killed by SIGKILL"}
    assert time.monotonic() - began < 15


def test_memory_is_limited() -> None:
    """Half a gigabyte more than the limit isn't given."""
    limits = Limits(wall_seconds=20, memory_bytes=128 << 20)
    assert run_tests("x = bytearray(1 << 29)", PASSES, limits).note == "MemoryError"
    assert run_tests("x = bytearray(1 << 20)\n" + RIGHT, PASSES, limits).is_passed


def test_files_are_limited() -> None:
    """No file grows beyond the limit, and all together not beyond the scratch folder."""
    limits = Limits(wall_seconds=20, file_bytes=1 << 20)
    big = "open('a', 'wb').write(bytes(1 << 21))"
    assert "File too large" in run_tests(big, PASSES, limits).note
    needs(Layer.NAMESPACES)
    many = "for n in range(200): open(str(n), 'wb').write(bytes(1 << 20))"
    assert "No space left" in run_tests(many, PASSES, limits).note


def test_output_goes_nowhere() -> None:
    """Printing without end costs nothing but the time that it has."""
    assert ran("while True: print('x' * 10_000)", limits=BRIEF).note == "timed out"
    assert ran("import os\nfor _ in range(100): os.write(1, b'x' * 9999)\n" + RIGHT).is_passed


def test_input_is_empty() -> None:
    """Reading from the user finds the end."""
    assert ran("input()").note.startswith("EOFError")


def test_secrets_of_the_environment_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its own environment nor that of any process above it can be read."""
    monkeypatch.setenv("HF_TOKEN", "a-secret")
    outcome = ran("import os\nassert 'a-secret' not in str(os.environ), 'seen'\n" + RIGHT)
    assert outcome.is_passed
    prying = (
        "import glob\nfor path in glob.glob('/proc/[0-9]*/environ'):\n"
        "  try: seen = open(path, 'rb').read()\n"
        "  except OSError: continue\n"
        "  assert b'a-secret' not in seen, 'seen'\n"
    )
    for layer in (Layer.NAMESPACES, Layer.LANDLOCK):
        needs(layer)
        assert ran(prying + RIGHT, layers=[layer]).is_passed


def test_files_outside_are_shut_off(tmp_path: Path) -> None:
    """Nothing is read or written but the standard library and the scratch folder."""
    needs(Layer.LANDLOCK)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for attempt in (
        f"open({str(secret)!r}).read()",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os; os.remove({str(secret)!r})",
        "open('/etc/passwd').read()",
        "import os; os.listdir('/')",
    ):
        assert "PermissionError" in ran(attempt).note, attempt
    assert secret.read_text() == "secret"
    working = "import decimal, sqlite3, xml.dom\nopen('a', 'w').write('x')\n"
    assert ran(working + RIGHT).is_passed


@pytest.mark.parametrize("layer", [Layer.NAMESPACES, Layer.SECCOMP])
def test_there_is_no_network(layer: Layer) -> None:
    """A listening server of this machine is not reached, with each barrier alone."""
    needs(layer)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)"
        outcome = ran(program, layers=[layer])
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    assert not outcome.is_passed
    assert "unreachable" in outcome.note or "not permitted" in outcome.note, outcome.note


def test_no_network_is_said_in_plain_words() -> None:
    """The usual way to a socket gives a message that says why."""
    note = ran("import socket; socket.socket()").note
    assert note == "PermissionError: there is no network here"


def test_processes_are_refused() -> None:
    """Under seccomp nothing forks; threads go on working."""
    needs(Layer.SECCOMP)
    for attempt in (
        "import os; os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import multiprocessing as m; p = m.Process(target=print); p.start()",
        "import os; os.kill(os.getppid(), 9)",
    ):
        assert "PermissionError" in ran(attempt).note, attempt
    thread = "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()\n"
    assert ran(thread + RIGHT).is_passed


ESCAPE = (
    "import os, time\n"
    "for _ in range(3):\n"
    "  if os.fork() == 0:\n"
    "    os.setsid()\n"
    "    if os.fork() == 0:\n"
    "      time.sleep(60)\n"
    "    os._exit(0)\n"
)


@pytest.mark.parametrize("layers", [[Layer.NAMESPACES], []])
def test_forks_that_leave_their_session_are_killed(layers: Collection[Layer]) -> None:
    """Without seccomp, children that were orphaned on purpose end with the code: it passes."""
    assert ran(ESCAPE + RIGHT, layers=layers).is_passed
    assert not left_behind()


@pytest.mark.parametrize("layers", [ALL, [Layer.NAMESPACES], []])
def test_a_fork_bomb_is_over_at_the_limit(layers: Collection[Layer]) -> None:
    """Children that go on forking are killed, also while they do; bounded here to 2^6 each."""
    bomb = (
        "import os, time\n"
        "for _ in range(6):\n"
        "  try: os.fork()\n"
        "  except OSError: pass\n"
        "while True: time.sleep(0.01)\n"
    )
    assert ran(bomb, layers=layers, limits=BRIEF).note == "timed out"
    assert not left_behind()


def test_a_killed_guard_leaves_nothing() -> None:
    """Without namespaces and seccomp code can kill its guard: all of it ends, and it's wrong."""
    program = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "  os.setsid()\n"
        "  time.sleep(60)\n"
        "above = open(f'/proc/{os.getppid()}/stat').read().rpartition(')')[2].split()[1]\n"
        "os.kill(int(above), 9)\n"
        "time.sleep(60)\n"
    )
    outcome = ran(program + RIGHT, layers=[])
    assert outcome == Outcome(False, "killed its guard")


def test_nothing_is_left_when_the_sweep_is_killed(tmp_path: Path) -> None:
    """The kernel ends guard and code when the process above them is gone."""
    code = (
        "from vllm_rvec.evaluation.sandbox.running import run_tests\n"
        "run_tests('import time; time.sleep(60)', 'pass')"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], env=env) as sweep:
        until(lambda: len(left_behind(tmp_path)) >= 2, "the code to run", seconds=20)
        sweep.kill()
    until(lambda: not left_behind(tmp_path), "the code to end", seconds=10)


def test_threads_run_code_at_the_same_time() -> None:
    """Several runs do not get into each other's way."""
    outcomes: list[Outcome] = []
    threads = [
        threading.Thread(target=lambda n=n: outcomes.append(ran(f"def f(): return {n}")))
        for n in (1, 2, 1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcome.is_passed for outcome in outcomes) == [False, False, True, True]


def test_sets_have_the_same_order_in_every_run() -> None:
    """Hashes of texts are not random: the same answer gets the same grade."""
    notes = {ran("raise ValueError(hash('a'))").note for _ in range(2)}
    assert len(notes) == 1


def test_crashes_of_the_interpreter_are_named() -> None:
    """A signal that ends the code stands in the note."""
    assert ran("import os; os.abort()").note == "killed by SIGABRT"
    assert ran("import ctypes; ctypes.string_at(0)").note == "killed by SIGSEGV"


def test_exceptions_that_cannot_be_shown_are_told_so() -> None:
    """What an exception's text does is the code's business, too."""
    program = "class E(Exception):\n  def __str__(self): raise KeyError\nraise E"
    assert ran(program).note == "an exception that can't be shown"
    assert len(ran("raise ValueError('x' * 9999)").note) == 300


def test_a_sandbox_that_does_not_work_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the harness itself can't start, that is an error and not a grade."""
    monkeypatch.setattr(running, "BOOT", "raise SystemExit(3)")
    with pytest.raises(ConfigError, match=r"(?s)does not work on this machine.*status 3"):
        ran(RIGHT)
    with pytest.raises(ConfigError, match="does not work on this machine"):
        isolation()
    monkeypatch.setattr(running, "BOOT", "import time; time.sleep(60)")
    monkeypatch.setattr(running, "GRACE_SECONDS", 0.1)
    with pytest.raises(ConfigError, match="has not answered"):
        ran(RIGHT, limits=BRIEF)


def test_the_sandbox_imports_nothing_above_it() -> None:
    """The guard starts with the standard library alone: quickly, and without what is installed."""
    program = "import sys\nfound = {'pydantic', 'vllm_rvec', 'sandbox'} & set(sys.modules)\n"
    assert ran(f"{program}def f(): return 1 + len(found)").is_passed
    assert ran("import pydantic").note.startswith("ModuleNotFoundError")
