"""What breaks: a killed engine, a killed parent, a vector that turns out bad in the engine."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
import yaml

from tests.integration.conftest import DEMO
from tests.support.processes import RunningServer, engine_processes, run_serve, until
from vllm_rvec.vector.settings_file import read_settings

if TYPE_CHECKING:
    from pathlib import Path

    import psutil

pytestmark = pytest.mark.engine


def long_stream(client: openai.OpenAI, model: str, count: int) -> Any:
    """Ask for `count` answers of 200 tokens at once: seconds of work, even for a tiny model."""
    return client.completions.create(
        model=model,
        prompt="Start with",
        max_tokens=200,
        temperature=1,
        n=count,
        stream=True,
        extra_body={"ignore_eos": True},
    )


def health(server: RunningServer) -> dict[str, Any]:
    url = server.base_url.removesuffix("/v1") + "/health"
    body: dict[str, Any] = httpx.get(url).json()
    return body


def one_variant(folder: Path) -> Path:
    """The demo's configuration with its enhanced variant alone."""
    settings = read_settings(DEMO / "serve.yaml")
    del settings["routing"]
    settings |= {"model": str(DEMO / "target"), "vector": str(DEMO / "vector")}
    settings["variants"] = {"enhanced@1": {"alpha": 1}}
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != "zombie"]


def status_of(client: openai.OpenAI, model: str) -> int | None:
    """200, an error's status, or None where no answer came in time."""
    try:
        client.completions.create(model=model, prompt="x", max_tokens=1)
    except openai.APITimeoutError:
        return None
    except openai.APIStatusError as exc:
        return exc.status_code
    return 200


def test_an_engine_that_hangs_is_skipped_and_taken_back(fused_demo: RunningServer) -> None:
    """It accepts and never answers: its requests wait, then get 503 at once; the other serves."""
    client, engine = fused_demo.client(timeout=2), fused_demo.engine("enhanced@1")
    engine.suspend()
    try:
        assert status_of(client, "enhanced@1") is None
        assert status_of(client, "base") == 200
        until(lambda: status_of(client, "enhanced@1") == 503, "the variant is skipped", 60)
        assert status_of(client, "base") == 200
    finally:
        engine.resume()
    until(lambda: status_of(client, "enhanced@1") == 200, "the variant is back", 60)


def test_a_killed_engine_ends_its_stream_alone_and_comes_back(fused_demo: RunningServer) -> None:
    """Its stream ends with an error, the other's goes on, requests get 503, then it is back."""
    demo = fused_demo
    client = demo.client()
    engine = demo.engine("enhanced@1")
    family = [engine, *engine.children(recursive=True)]
    assert len(family) > 1
    whole = long_stream(client, "base", 32)
    next(iter(whole))
    broken = long_stream(client, "enhanced@1", 64)
    next(iter(broken))
    engine.send_signal(signal.SIGKILL)
    with pytest.raises(openai.APIError):
        for _ in broken:
            pass
    # At once, also before the supervisor has cleared the remains away.
    with pytest.raises(openai.InternalServerError) as refused:
        client.completions.create(model="enhanced@1", prompt="x")
    assert refused.value.status_code == 503
    finished = [choice.finish_reason for chunk in whole for choice in chunk.choices]
    assert finished.count("length") == 32
    until(lambda: health(demo)["status"] == "degraded", "the variant is marked down", 20)
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="enhanced@1", prompt="x")
    assert caught.value.status_code == 503
    assert [model.id for model in client.models.list()] == ["base", "assistant"]
    until(lambda: not alive(family), "no process of the killed engine is left", 10)
    until(lambda: health(demo)["status"] == "ready", "the variant is back", 180)
    assert client.completions.create(model="enhanced@1", prompt="x", max_tokens=1).choices


def test_a_killed_parent_takes_its_engines_with_it(tmp_path: Path) -> None:
    """Kill -9 on `serve`: within 5 s no engine process is left to hold memory."""
    arguments = ["--config", str(one_variant(tmp_path))]
    with run_serve(arguments, tmp_path / "log") as server:
        family = server.process_family()
        assert engine_processes(server.process.pid)
        server.process.kill()
        until(lambda: not alive(family), "every process of the server is gone", 5)


def test_sigterm_leaves_nothing(tmp_path: Path) -> None:
    """While an engine is still starting: a clean end, exit status 0, no process."""
    log = (tmp_path / "log").open("w")
    command = [sys.executable, "-m", "vllm_rvec.serve", "--config", str(DEMO / "serve.yaml")]
    process = subprocess.Popen([*command, "--port", "0"], stdout=log, stderr=log)
    until(lambda: bool(engine_processes(process.pid)), "the first engine is starting", 60)
    family = RunningServer(process, "", [], tmp_path / "log").process_family()  # type: ignore[arg-type]
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    until(lambda: not alive(family), "every process of the server is gone", 5)


def test_a_refusal_of_the_loader_ends_the_command_with_one_clear_error(tmp_path: Path) -> None:
    """Found by the engine alone: the command shows its reason, its last lines, and exits with 8."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vllm_rvec.serve", "--port", "0"),
            *("--config", str(one_variant(tmp_path))),
            *("--", "--model-loader-extra-config", '{"vektor": "x"}'),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 8
    error = done.stderr[done.stderr.rindex("error: ") :]
    assert "ConfigError" in done.stderr[-3000:]
    assert "unknown key 'vektor'" in done.stderr[-3000:]
    assert len(error.splitlines()) < 25
