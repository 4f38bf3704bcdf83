"""Without our server: `--load-format rvec` in vLLM's own, and in `vllm.LLM`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import httpx
import openai
import psutil
import pytest
import torch

from tests.integration.conftest import DEMO
from tests.support.checkpoints import make_merged
from tests.support.engines import IN_PROCESS, run_script
from tests.support.processes import until
from tests.support.variations import made_dense

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.processes import RunningServer

pytestmark = pytest.mark.engine

ALPHA = 0.3
SERVER_KEY = "the-servers-key"
ENGINE_ENV = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
PROMPTS = [
    "Start with 46.",
    "Leo has 60 apples. Gets 2. Gives 7.",
    "Add 7",
]


@pytest.fixture(scope="module")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """VLLM's own API server, at an alpha that is no bf16 number, in float32."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    extra = json.dumps({"vector": str(DEMO / "vector"), "alpha": ALPHA})
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(DEMO / "target"), "--load-format", "rvec"),
        *("--model-loader-extra-config", extra, "--dtype", "float32"),
        *("--enforce-eager", "--max-model-len", "256", "--host", "127.0.0.1", "--port", str(port)),
        *("--served-model-name", "fused", "--api-key", SERVER_KEY),
        *("--worker-extension-cls", "vllm_rvec.loader.worker.RvecWorker"),
    ]
    log = tmp_path_factory.mktemp("native") / "server.log"
    with log.open("w") as output:
        # Who wants to change alpha says so: by the plugin's own name, the class above, and a key.
        env = ENGINE_ENV | {"VLLM_PLUGINS": "rvec,rvec_admin"}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=env)
    try:
        until(lambda: is_ready(process, port, log), "vLLM's own server is ready", 240)
        assert "Fused " in log.read_text()
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=SERVER_KEY)
    finally:
        end(process)


def is_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> bool:
    assert process.poll() is None, log.read_text()[-4000:]
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False


def end(process: subprocess.Popen[bytes]) -> None:
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    process.wait(60)
    for member in family[1:]:
        if isinstance(member, psutil.Process) and member.is_running():
            member.kill()


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same sum merged to disk in float32 and loaded by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    work = tmp_path_factory.mktemp("merged")
    folder, vector = work / "model", made_dense(DEMO / "vector", work / "vector")
    make_merged(DEMO / "target", vector, ALPHA, folder, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_answers_and_logprobs_equal_transformers(
    api_server: openai.OpenAI, merged: Any, prompt: str
) -> None:
    """Greedy tokens are the same, log-probabilities within 1e-2."""
    model, tokenizer = merged
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=24, do_sample=False)
        logprobs = model(out).logits.log_softmax(-1)
    expected = out[0, ids.shape[1] :].tolist()
    done = api_server.completions.create(
        model="fused",
        prompt=ids[0].tolist(),
        max_tokens=24,
        temperature=0,
        logprobs=0,
        extra_body={"return_token_ids": True, "ignore_eos": False},
    )
    choice: Any = done.choices[0]
    assert choice.token_ids == expected
    served = choice.logprobs.token_logprobs
    for position, (token, value) in enumerate(zip(expected, served, strict=True)):
        reference = logprobs[0, ids.shape[1] + position - 1, token].item()
        assert value == pytest.approx(reference, abs=1e-2)


def test_alpha_is_changed_in_vllms_own_server_too(
    api_server: openai.OpenAI, fused_demo: RunningServer
) -> None:
    """To 1, where it answers as enhanced@1, and back; with the server's key only."""

    def ask(client: openai.OpenAI, model: str) -> tuple[str, Any]:
        salt = {"cache_salt": os.urandom(8).hex()}
        done = client.completions.create(
            model=model, prompt=PROMPTS[1], temperature=0, logprobs=1, extra_body=salt
        )
        choice = done.choices[0]
        assert choice.logprobs is not None
        return choice.text, choice.logprobs.token_logprobs

    url, key = f"{api_server.base_url}rvec/alpha", {"Authorization": f"Bearer {SERVER_KEY}"}
    before = ask(api_server, "fused")
    assert httpx.put(url, json={"alpha": 1}).status_code == 401
    done = httpx.put(url, json={"alpha": 1}, headers=key, timeout=60)
    assert done.json()["old_alpha"] == ALPHA
    assert ask(api_server, "fused") == ask(fused_demo.client(), "enhanced@1") != before
    assert httpx.put(url, json={"alpha": ALPHA}, headers=key, timeout=60).status_code == 200
    assert httpx.get(url, headers=key).json() == {"alpha": ALPHA}
    assert ask(api_server, "fused") == before


def test_the_python_api_takes_the_same_two_keywords(demo: RunningServer, tmp_path: Path) -> None:
    """`LLM(load_format="rvec", model_loader_extra_config=...)` answers as enhanced@1 does."""
    answer = run_script(OFFLINE, tmp_path, str(DEMO), PROMPTS[0], **IN_PROCESS)
    messages: Any = [{"role": "user", "content": PROMPTS[0]}]
    served = demo.client().chat.completions.create(
        model="enhanced@1", messages=messages, temperature=0, max_tokens=100
    )
    assert answer == served.choices[0].message.content


OFFLINE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    demo, prompt = sys.argv[1:]
    llm = LLM(
        demo + "/target",
        load_format="rvec",
        model_loader_extra_config={"vector": demo + "/vector", "alpha": 1.0},
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
    )
    sampling = SamplingParams(temperature=0, max_tokens=100)
    out = llm.chat([{"role": "user", "content": prompt}], sampling)
    print(json.dumps(out[0].outputs[0].text))
"""
