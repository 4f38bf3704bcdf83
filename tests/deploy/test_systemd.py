"""deploy/systemd/: the unit is one, its limits fit the command, and its command line runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import yaml

from tests.deploy.tools import DEPLOY
from tests.integration.conftest import DEMO
from tests.support.processes import until
from vllm_rvec.cli.main import EXIT_CODES
from vllm_rvec.cli.routing import routing_of
from vllm_rvec.errors import EngineStartupError, FetchError
from vllm_rvec.serve import load_config
from vllm_rvec.serve.supervisor import Pace

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = DEPLOY / "systemd"
UNIT = FOLDER / "vllm-rvec.service"
SCRIPT = DEPLOY / "compose" / "with-secrets.sh"
MOST_EXPOSED = 2.5
"""Of 10, by systemd's own reckoning. GPUs, network and code that is made at run time cost 2.1."""


def settings() -> dict[str, list[str]]:
    """Every value of each setting, in order."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def one(name: str) -> str:
    (value,) = settings()[name]
    return value


def installed(text: str, config: Path) -> str:
    """The same with this machine's paths."""
    places = {
        "/opt/vllm-rvec/libexec/with-secrets.sh": SCRIPT,
        "/opt/vllm-rvec/bin": Path(sys.executable).parent,
        "/etc/vllm-rvec/serve.yaml": config,
    }
    for there, here in places.items():
        text = text.replace(there, str(here))
    return text


@pytest.fixture
def analyze(tmp_path: Path) -> list[str]:
    """Systemd's own checks, and the unit as it would be installed here."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not here")
    copy = tmp_path / UNIT.name
    copy.write_text(installed(UNIT.read_text(), FOLDER / "serve.yaml"))
    return [program, str(copy)]


def test_systemd_takes_the_unit(analyze: list[str]) -> None:
    """Without a warning."""
    program, unit = analyze
    done = subprocess.run([program, "verify", unit], capture_output=True, text=True, check=False)
    warnings = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert (done.returncode, warnings) == (0, [])


def test_the_unit_is_hardened(analyze: list[str]) -> None:
    """By systemd's own reckoning, offline."""
    program, unit = analyze
    words = [program, "security", "--offline=true", "--no-pager", unit]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    score = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert score is not None, done.stderr
    assert float(score[1]) <= MOST_EXPOSED


def test_settings_stand_once_and_alone() -> None:
    """Comments have lines of their own (systemd knows no others); only lists may be given again."""
    again = {name for name, values in settings().items() if len(values) > 1}
    assert again == {"LoadCredential", "DeviceAllow", "Environment"}
    assert not [value for values in settings().values() for value in values if " #" in value]


def test_what_a_restart_would_not_mend_is_not_restarted() -> None:
    """All exit statuses but that of an engine and of the network, and a wrong command line."""
    may_help = {EXIT_CODES[EngineStartupError], EXIT_CODES[FetchError]}
    assert {int(code) for code in one("RestartPreventExitStatus").split()} == {
        2,
        *(set(EXIT_CODES.values()) - may_help),
    }


def test_there_is_time_to_drain() -> None:
    """More than requests get, and engines to end."""
    config = load_config(FOLDER / "serve.yaml", {})
    stop = int(one("TimeoutStopSec").removesuffix("s"))
    assert stop > config.drain_seconds + Pace().teardown_seconds
    assert one("KillMode") == "mixed"


def test_the_file_fits_the_unit() -> None:
    """Its port is asked, its files are where the unit may read and write, its names are right."""
    file = FOLDER / "serve.yaml"
    config = load_config(file, {})
    assert f"http://127.0.0.1:{config.port}/readyz" in one("ExecStartPost")
    assert Path(config.model).is_relative_to(one("ReadOnlyPaths"))
    routing = routing_of(config, file, is_dial=True)
    assert routing.results is not None
    assert Path(routing.results.path).parent == Path("/var/lib", one("StateDirectory"))


def test_programs_of_the_environment_are_found() -> None:
    """By engines too, which start compilers by name."""
    (path,) = [line for line in settings()["Environment"] if line.startswith("PATH=")]
    command = shlex.split(one("ExecStart"))[1]
    assert path.removeprefix("PATH=").split(":")[0] == str(Path(command).parent)


def test_keys_are_variables_of_the_command() -> None:
    """And lie where the unit's configuration does."""
    for given in settings()["LoadCredential"]:
        name, _, file = given.partition(":")
        assert name in {"VLLM_RVEC_API_KEY", "VLLM_RVEC_ADMIN_KEY"}
        assert Path(file).parent == Path("/etc", one("ConfigurationDirectory"))


def prepared(folder: Path) -> Path:
    """The unit's file with the demo's model, and keys, laid into a folder."""
    given = yaml.safe_load((FOLDER / "serve.yaml").read_text())
    demo = yaml.safe_load((DEMO / "serve.yaml").read_text())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given["port"] = taken.getsockname()[1]
    given |= {"model": str(DEMO / "target"), "vector": str(DEMO / "vector")}
    given |= {"engine": demo["engine"], "env": demo["env"]}
    given["routing"]["results"]["path"] = str(folder / "results.sqlite")
    (folder / "serve.yaml").write_text(yaml.safe_dump(given))
    (folder / "keys").mkdir()
    (folder / "keys" / "VLLM_RVEC_API_KEY").write_text("of-clients\n")
    return folder / "serve.yaml"


def environment(folder: Path) -> dict[str, str]:
    """What systemd would give: nothing of the user's, and the unit's own variables."""
    words = [word for line in settings()["Environment"] for word in line.split()]
    unit = dict(word.split("=", 1) for word in words)
    places = {"%d": folder / "keys", "%S": folder / "state", "%C": folder / "cache"}
    for sign, place in places.items():
        unit = {name: value.replace(sign, str(place)) for name, value in unit.items()}
    # How arithmetic is done on this machine is no setting of the user's.
    kept = {name: value for name, value in os.environ.items() if name.startswith("OPENBLAS_")}
    return kept | {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"} | unit


@contextmanager
def started(config: Path) -> Iterator[subprocess.Popen[bytes]]:
    """ExecStart, as the unit's process would be."""
    command = shlex.split(installed(one("ExecStart"), config))
    work = config.parent / "state" / "vllm-rvec"
    work.mkdir(parents=True)
    log = (config.parent / "log").open("wb")
    with (
        log,
        subprocess.Popen(
            command, cwd=work, env=environment(config.parent), stdout=log, stderr=log
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def wait_as_the_unit(config: Path, pid: int) -> int:
    """ExecStartPost; gives its exit status."""
    port = yaml.safe_load(config.read_text())["port"]
    text = one("ExecStartPost").replace("${MAINPID}", str(pid)).replace(":8000/", f":{port}/")
    return subprocess.run(shlex.split(text), check=False, timeout=240).returncode


@pytest.mark.engine
def test_the_command_line_runs(tmp_path: Path) -> None:
    """Started, ready, asked with a key from a credential, reloaded and stopped, as by the unit."""
    config = prepared(tmp_path)
    with started(config) as process:
        assert wait_as_the_unit(config, process.pid) == 0, (tmp_path / "log").read_text()[-4000:]
        port = yaml.safe_load(config.read_text())["port"]
        url, headers = f"http://127.0.0.1:{port}", {"Authorization": "Bearer of-clients"}
        assert httpx.get(f"{url}/v1/models").status_code == 401
        messages = [{"role": "user", "content": "Add 7"}]
        body = {"model": "assistant", "messages": messages, "user": "alice", "max_tokens": 4}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] > 0
        assert one("ExecReload") == "/bin/kill -HUP $MAINPID"
        process.send_signal(signal.SIGHUP)
        generation = "vllm_rvec_router_configuration_generation 2.0"
        until(lambda: generation in httpx.get(f"{url}/metrics").text, "a reload", 20)
        process.send_signal(signal.SIGTERM)
        assert process.wait(int(one("TimeoutStopSec").removesuffix("s"))) == 0
    assert (tmp_path / "results.sqlite").exists()
    assert "of-clients" not in (tmp_path / "log").read_text()


def test_a_start_that_fails_is_seen_at_once(tmp_path: Path) -> None:
    """A wrong file: its exit status is one that is not started again, and nobody waits for it."""
    config = prepared(tmp_path)
    config.write_text(config.read_text() + "prot: 1\n")
    with started(config) as process:
        assert process.wait(60) == 3
        assert str(process.returncode) in one("RestartPreventExitStatus").split()
        assert wait_as_the_unit(config, process.pid) == 1
