"""Ray Serve LLM with deploy/ray/serve.yaml and the demo's model, on a local Ray without GPUs.

Runs in Ray's own environment (`make ray`), and prints what each variant answered as JSON:

    .venv-ray/bin/python tests/deploy/ray_serve.py PORT QUESTION...
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "reasoning_in_miniature"
SMALL = {
    "dtype": "float32",
    "max_model_len": 256,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 2**28,
}


def localized(config: dict[str, Any]) -> dict[str, Any]:
    """One variant with the demo's files, one replica, and no GPU."""
    config = {name: given for name, given in config.items() if name != "accelerator_type"}
    engine = config["engine_kwargs"] | SMALL
    engine["model_loader_extra_config"] |= {"vector": str(DEMO / "vector")}
    return config | {
        "accelerator_config": {"kind": "cpu"},
        "deployment_config": {"num_replicas": 1},
        "engine_kwargs": engine,
        "model_loading_config": config["model_loading_config"]
        | {"model_source": str(DEMO / "target")},
    }


def ask(port: int, model: str, question: str) -> dict[str, str]:
    """Ask one variant; who answered, and what."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 64,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - our own server
        said = json.load(answer)
    return {"model": said["model"], "content": said["choices"][0]["message"]["content"]}


def main(port: int, questions: list[str]) -> None:
    """Serve both, ask both, end."""
    import ray  # type: ignore[import-not-found]  # it has an environment of its own
    from ray import serve
    from ray.serve.llm import build_openai_app  # type: ignore[import-not-found]
    from ray.serve.schema import ServeDeploySchema  # type: ignore[import-not-found]

    given = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(given).applications
    configs = [localized(config) for config in application.args["llm_configs"]]
    ray.init(num_cpus=8, include_dashboard=False, object_store_memory=200 * 2**20)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_openai_app({"llm_configs": configs}), route_prefix=application.route_prefix)
    names = [config["model_loading_config"]["model_id"] for config in configs]
    found = {name: [ask(port, name, question) for question in questions] for name in names}
    sys.stdout.write(f"\n{json.dumps(found)}\n")
    sys.stdout.flush()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
