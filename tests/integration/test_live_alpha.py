"""Another alpha on a live engine, through the HTTP API: one server, one variant, changed often."""

from __future__ import annotations

import json
import os
import shutil
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.integration.conftest import DEMO
from tests.support.processes import run_serve, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.processes import RunningServer

pytestmark = pytest.mark.engine

NAME = "live"
ADMIN_KEY = "the-admin-key-nobody-may-see"
PROMPT = "Leo has 60 apples. Gets 2. Gives 7."
LONG = " ".join(f"Start with {n}. Add 5. Take 8. What is the result?" for n in range(40, 52))
"""More than the 128 tokens of a block, so that the prefix cache can hold some of it."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's target in two shards, the second of which a test damages."""
    folder = tmp_path_factory.mktemp("live") / "target"
    shutil.copytree(DEMO / "target", folder)
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(whole)
    shards = {"model-00001-of-00002.safetensors": names[:30]}
    shards["model-00002-of-00002.safetensors"] = names[30:]
    for file, part in shards.items():
        save_file({n: whole[n] for n in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f for f, part in shards.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def live(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One engine, at alpha 0, with the demo's other settings.

    By a recipe that adds the demo's vector in two parts: together they are the demo's own, so that
    all answers must be.
    """
    folder = tmp_path_factory.mktemp("live-serve")
    config = folder / "serve.yaml"
    demo = (DEMO / "serve.yaml").read_text()
    _, rest = demo.split("engine:\n")
    parts: list[dict[str, object]] = [
        {"layers": "0-1"},
        {"exclude": ["*.layers.0.*", "*.layers.1.*"], "alpha": {"default": 1}},
    ]
    settings = {
        "model": str(target),
        "vectors": [{"path": str(DEMO / "vector"), **part} for part in parts],
        "variants": {NAME: {"alpha": 0}},
        "drain_seconds": 1,
    }
    config.write_text(yaml.safe_dump(settings) + f"engine:\n{rest}")
    arguments = ["--config", str(config), "--", "--enable-prompt-tokens-details"]
    env = {"VLLM_RVEC_ADMIN_KEY": ADMIN_KEY}
    with run_serve(arguments, folder / "log", env=env) as server:
        yield server


def put(server: RunningServer, alpha: object, key: str = ADMIN_KEY) -> httpx.Response:
    return httpx.put(
        f"{server.base_url}/rvec/variants/{NAME}",
        json={"alpha": alpha},
        headers={"Authorization": f"Bearer {key}"},
        timeout=120,
    )


def change(server: RunningServer, alpha: float) -> dict[str, Any]:
    response = put(server, alpha)
    assert response.status_code == 200, response.text
    done: dict[str, Any] = response.json()
    assert done["alpha"] == alpha
    return done


def answer(server: RunningServer, model: str, prompt: str = PROMPT) -> tuple[str, Any]:
    """Text and log-probabilities, greedy; salted, so that no engine has it cached."""
    done = server.client().completions.create(
        model=model,
        prompt=prompt,
        max_tokens=40,
        temperature=0,
        logprobs=3,
        extra_body={"cache_salt": os.urandom(8).hex()},
    )
    choice = done.choices[0]
    assert choice.logprobs is not None
    return choice.text, (choice.logprobs.token_logprobs, choice.logprobs.top_logprobs)


def cached_tokens(server: RunningServer) -> int:
    done = server.client().completions.create(model=NAME, prompt=LONG, max_tokens=1, temperature=0)
    assert done.usage is not None
    assert done.usage.prompt_tokens_details is not None
    return done.usage.prompt_tokens_details.cached_tokens or 0


def test_each_alpha_answers_as_an_engine_started_at_it(
    live: RunningServer, fused_demo: RunningServer
) -> None:
    """0, 1, 0.3 and back: text and log-probabilities, bit for bit."""
    base, enhanced = answer(fused_demo, "base"), answer(fused_demo, "enhanced@1")
    assert base != enhanced
    assert answer(live, NAME) == base
    done = change(live, 1)
    assert (done["old_alpha"], done["alpha"], done["ranks"]) == (0.0, 1.0, 1)
    assert done["copies"] > 50
    assert answer(live, NAME) == enhanced
    change(live, 0.3)
    between = answer(live, NAME)
    assert between not in (base, enhanced)
    change(live, 1)
    assert answer(live, NAME) == enhanced
    change(live, 0.3)
    assert answer(live, NAME) == between
    assert change(live, 0)["copies"] == 0
    assert answer(live, NAME) == base


def test_no_cached_prefix_outlives_a_change(live: RunningServer) -> None:
    """Hits while alpha stays, none on the first request after it has changed, even to the same."""
    change(live, 0.5)
    assert cached_tokens(live) == 0
    assert cached_tokens(live) >= 128
    for alpha in (1, 1, 0.5):
        change(live, alpha)
        assert cached_tokens(live) == 0
        assert cached_tokens(live) >= 128


def test_answers_and_lists_say_the_alpha_that_is_served(live: RunningServer) -> None:
    """By header, on the model's card, and where variants are listed."""
    change(live, 0.25)
    client = live.client()
    raw = client.completions.with_raw_response.create(model=NAME, prompt="x", max_tokens=1)
    assert raw.headers["x-rvec-alpha"] == "0.25"
    (card,) = client.models.list()
    both_parts = f"{DEMO / 'vector'} + {DEMO / 'vector'}"
    said: Any = card.to_dict()["rvec"]
    assert (said["alpha"], said["vector"]) == (0.25, both_parts)
    assert said["fingerprint"].count("blake3:") == 2
    (variant,) = httpx.get(f"{live.base_url}/rvec/variants").json()["data"]
    assert (variant["id"], variant["alpha"], variant["state"]) == (NAME, 0.25, "ready")


def test_who_has_no_admin_key_changes_nothing(live: RunningServer) -> None:
    """Nor does who sends something that is no alpha; and the engine's own path is not forwarded."""
    change(live, 0.25)
    assert put(live, 1, key="wrong").status_code == 401
    for wrong in (True, "1", None, 1e39, [1]):
        assert put(live, wrong).status_code == 400
    path = f"{live.base_url}/rvec/alpha"
    assert httpx.put(path, json={"alpha": 1}).status_code == 404
    assert httpx.get(f"{live.base_url}/rvec/variants/{NAME}").json()["alpha"] == 0.25
    assert ADMIN_KEY not in live.log.read_text()


def test_requests_that_take_too_long_are_not_cut_short(live: RunningServer) -> None:
    """The change is refused after `drain_seconds`; they and those that waited go on, unchanged."""
    change(live, 0.25)
    client = live.client()
    streams = [
        client.completions.create(
            model=NAME,
            prompt="Start with",
            max_tokens=200,
            temperature=1,
            n=64,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for _ in range(6)
    ]
    with in_background(lambda: answer(live, NAME)) as waited:
        response = put(live, 1)
    assert response.status_code == 409, response.text
    assert "did not end within 1 s" in response.json()["error"]["message"]
    finished = [c.finish_reason for stream in streams for chunk in stream for c in chunk.choices]
    assert finished.count("length") == 6 * 64
    assert waited[0] == answer(live, NAME)


def test_a_target_that_has_changed_on_disk_is_refused(live: RunningServer, target: Path) -> None:
    """A reload would serve other weights: the old alpha goes on."""
    change(live, 0.25)
    before = answer(live, NAME)
    (target / "new.json").write_text("{}")
    response = put(live, 1)
    (target / "new.json").unlink()
    assert response.status_code == 409
    assert "new.json: new" in response.json()["error"]["message"]
    assert answer(live, NAME) == before


def test_a_failure_part_way_is_never_served(live: RunningServer, target: Path) -> None:
    """Half of the weights are in when the next shard turns out bad.

    The engine is killed, and comes back at the alpha that a change had given it before: so this
    also shows that it starts at that one, and answers as it did live.
    """
    change(live, 0.3)
    before, family = answer(live, NAME), live.process_family()[1:]
    shard = target / "model-00002-of-00002.safetensors"
    sound, stat = shard.read_bytes(), shard.stat()
    overwrite(shard, b"\xff" * len(sound), stat)
    with in_background(lambda: put(live, 1)) as changed:
        until(lambda: bool(changed), "the change has ended")
    overwrite(shard, sound, stat)
    assert changed[0].status_code == 500
    assert changed[0].json()["error"]["code"] == "alpha_change_failed"
    with pytest.raises(openai.InternalServerError) as refused:
        answer(live, NAME)
    assert refused.value.status_code == 503
    until(lambda: not any(p.is_running() for p in family), "the engine is gone", 20)
    health = live.base_url.removesuffix("/v1") + "/health"
    until(lambda: httpx.get(health).json()["status"] == "ready", "it is back", 180)
    assert answer(live, NAME) == before
    assert httpx.get(f"{live.base_url}/rvec/variants/{NAME}").json()["alpha"] == 0.3
    change(live, 1)
    assert answer(live, NAME) != before


def overwrite(path: Path, content: bytes, stat: os.stat_result) -> None:
    """In place, with size, inode and times as before: nothing that a look could tell."""
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@contextmanager
def in_background(work: Any) -> Iterator[list[Any]]:
    """Run something beside the body; its result is in the list at the end."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(work()))
    thread.start()
    try:
        yield result
    finally:
        thread.join(60)
