"""vllm_rvec.cli.serve: what is wrong is said before any engine starts, in one screen."""

from __future__ import annotations

import json
import math
import shutil
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pytest
from rich.console import Console
from safetensors.torch import save_file

from tests.support.checkpoints import make_checkpoint, tensors
from tests.support.variations import resized
from vllm_rvec.cli.routing import routing_of
from vllm_rvec.cli.serve import _Server
from vllm_rvec.errors import ConfigError
from vllm_rvec.router import Routing
from vllm_rvec.serve import EngineConsole, EngineState, choose_mode, load_config, plan_engines
from vllm_rvec.vector import VectorReader

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family
    from vllm_rvec.serve import ServeConfig

SCREEN_LINES = 24


def serve(*arguments: object) -> tuple[int, str]:
    """Run the command as a user does; return its exit status and what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "vllm_rvec.serve", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    text = done.stdout + done.stderr
    assert len(text.splitlines()) <= SCREEN_LINES, text
    assert "Traceback" not in text
    return done.returncode, " ".join(text.split())


def test_a_missing_target(vector: Path, tmp_path: Path) -> None:
    """Exit status 4, and the path."""
    code, text = serve("--model", tmp_path / "nowhere", "--vector", vector)
    assert code == 4
    assert f"there is no target {tmp_path / 'nowhere'}" in text


def test_a_missing_vector(family: Family, tmp_path: Path) -> None:
    """Exit status 5, and the path."""
    code, text = serve("--model", family.target, "--vector", tmp_path / "nowhere")
    assert code == 5
    assert f"there is no vector folder {tmp_path / 'nowhere'}" in text


def test_each_of_several_vectors_is_looked_for(
    family: Family, vector: Path, tmp_path: Path
) -> None:
    """Each is added; the second is missing."""
    vectors = ("--vector", vector, "--vector", tmp_path / "nowhere")
    code, text = serve("--model", family.target, *vectors)
    assert code == 5
    assert f"there is no vector folder {tmp_path / 'nowhere'}" in text


@pytest.mark.parametrize("side", ["target", "vector"])
def test_a_truncated_file(family: Family, vector: Path, tmp_path: Path, side: str) -> None:
    """Exit status 4 for the target, 6 for the vector; the file is named."""
    folders = {"target": family.target, "vector": vector}
    folders[side] = shutil.copytree(folders[side], tmp_path / side)
    (shard,) = folders[side].glob("*.safetensors")
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-7])
    code, text = serve("--model", folders["target"], "--vector", folders["vector"])
    assert code == (4 if side == "target" else 6)
    named = f"{shard} can't be read" if side == "target" else f"{shard.name}: {size - 7} bytes"
    assert named in text


def test_a_vector_of_another_architecture(family: Family, vector: Path, tmp_path: Path) -> None:
    """Exit status 7, and both architectures."""
    target = shutil.copytree(family.target, tmp_path / "target")
    config = json.loads((target / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (target / "config.json").write_text(json.dumps(config))
    code, text = serve("--model", target, "--vector", vector)
    assert code == 7
    assert "donors have qwen2, the target has llama" in text


def test_shapes_that_differ(vector: Path, tmp_path: Path) -> None:
    """Exit status 7; all mismatches are counted, the first few shown."""
    target = make_checkpoint(tmp_path / "target", seed=0, layers=3)
    stored = tensors(target)
    stored["model.norm.weight"] = stored["model.norm.weight"][:5].clone()
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    code, text = serve("--model", target, "--vector", vector)
    assert code == 7
    assert "13 tensors don't match" in text
    assert "... and 6 more" in text  # of 13, and another initialisation


def test_a_target_of_another_initialisation(vector: Path, tmp_path: Path) -> None:
    """Exit status 7 before any engine starts; both numbers are shown."""
    stranger = make_checkpoint(tmp_path / "stranger", seed=5)
    code, text = serve("--model", stranger, "--vector", vector)
    assert code == 7
    assert "lineage: relative distance 1." in text
    assert "--force" in text


def test_a_policy_of_another_name(family: Family, vector: Path) -> None:
    """Exit status 3, and those that there are."""
    code, text = serve("--model", family.target, "--vector", vector, "--vocab", "some")
    assert code == 3
    assert "'strict', 'common' or 'skip-embeddings'" in text


def test_what_is_forced_is_logged(vector: Path, tmp_path: Path) -> None:
    """`--force` and `--vocab` reach the check; a port in use then ends the command."""
    stranger = resized(make_checkpoint(tmp_path / "stranger", seed=5), tmp_path / "t", 576)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = ("--model", stranger, "--vector", vector, "--force", "--vocab", "common")
        code, text = serve(*arguments, "--port", port)
    assert code == 3
    assert "refused but forced: lineage: another pretrained initialisation" in text
    assert "structure: model.embed_tokens.weight: nothing is added to rows 512 to 575" in text


def test_a_nan_in_the_vector(family: Family, vector: Path, tmp_path: Path) -> None:
    """Exit status 6 before any engine starts; the tensor is named."""
    spoilt = shutil.copytree(vector, tmp_path / "v")
    info = VectorReader(spoilt).table["model.norm.weight"]
    with info.shard.open("r+b") as file:
        file.seek(info.offset_bytes)
        file.write(struct.pack("<f", math.nan))
    code, text = serve("--model", family.target, "--vector", spoilt)
    assert code == 6
    assert "model.norm.weight" in text


@pytest.mark.parametrize("alpha", ["nan", "inf", "1e39", "much", "1,,2", "0,-0.0", ""])
def test_an_alpha_that_is_no_finite_number(family: Family, vector: Path, alpha: str) -> None:
    """Exit status 3, and how to write it."""
    code, text = serve("--model", family.target, "--vector", vector, "--alpha", alpha)
    assert code == 3
    assert "such as 0,0.5,1" in text


def test_a_port_in_use(family: Family, vector: Path) -> None:
    """Exit status 3 at once, not after half a minute of engines."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, text = serve("--model", family.target, "--vector", vector, "--port", port)
    assert code == 3
    assert f"port {port}" in text
    assert "another process listens there" in text


@pytest.mark.parametrize("name", ["vector.pt", "vector.bin"])
def test_a_pickle_as_vector(family: Family, tmp_path: Path, name: str) -> None:
    """Exit status 5: safetensors only."""
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    code, text = serve("--model", family.target, "--vector", tmp_path / name)
    assert code == 5
    assert f"no vector folder {tmp_path / name} why: it is a file" in text


def test_a_pickle_as_target(family: Family, vector: Path, tmp_path: Path) -> None:
    """Exit status 4: safetensors only."""
    target = shutil.copytree(family.target, tmp_path / "target")
    (target / "model.safetensors").rename(target / "pytorch_model.bin")
    code, text = serve("--model", target, "--vector", vector)
    assert code == 4
    assert "pickle files can run code" in text


def test_all_mistakes_in_the_configuration_at_once(tmp_path: Path) -> None:
    """Exit status 3, the file's name and a line each; the key is never shown."""
    path = tmp_path / "serve.yaml"
    path.write_text("vektor: x\nport: 99999\napi_key: [sesame]\n")
    code, text = serve("--config", path)
    assert code == 3
    for part in (
        str(path),
        "`vektor` is not a setting",
        "`port`",
        "`api_key`",
        "`model` is missing",
    ):
        assert part in text
    assert "sesame" not in text


def test_a_flag_that_is_ours_to_give(family: Family, vector: Path) -> None:
    """Exit status 3, and what to write instead."""
    code, text = serve(
        "--model", family.target, "--vector", vector, "--", "--port", 9, "--load-format", "auto"
    )
    assert code == 3
    assert "--port" in text
    assert "--load-format" in text


def test_an_unknown_option_is_a_usage_error(family: Family) -> None:
    """Exit status 2."""
    code, text = serve("--model", family.target, "--vektor", "x")
    assert code == 2
    assert "No such option: --vektor" in text


def logged(*arguments: object) -> tuple[int, str]:
    """Run up to where the port is taken: what is logged before any engine starts."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, text = serve("--port", taken.getsockname()[1], *arguments)
    assert "another process listens there" in text or code != 3, text
    return code, text


def test_the_mode_and_its_reason_are_logged(family: Family, vector: Path) -> None:
    """Whichever it is; also why it is not the other."""
    both = ("--model", family.target, "--vector", vector)
    _, text = logged(*both, "--alpha-range", "-0.5:1")
    assert "mode dial: for `alpha_range`" in text
    _, text = logged(*both)
    assert "mode dial: one engine for 2 alphas and any other in -1:2; --mode fused starts" in text
    _, text = logged(*both, "--alpha", "1")
    assert "mode fused: there is one alpha; with --mode dial, requests could choose" in text
    _, text = logged(*both, "--", "--enable-lora")
    assert "mode fused: one engine for each alpha, for want of a dial: --enable-lora: " in text


def test_a_mode_that_can_not_be_had(family: Family, vector: Path) -> None:
    """Exit status 3 with each reason and the ways out, before anything is verified."""
    both = ("--model", family.target, "--vector", vector)
    code, text = serve(*both, "--mode", "dial", "--", "-pp", "2", "--enable-lora")
    assert code == 3
    for part in ("--pipeline-parallel-size: ", "--enable-lora: ", "use --mode fused"):
        assert part in text
    code, text = serve(*both, "--mode", "fused", "--vector-dtype", "int8")
    assert code == 3
    assert "`vector_dtype`" in text
    code, text = serve(*both, "--mode", "both", "--alpha-range", "2:1", "--vector-dtype", "int4")
    assert code == 3
    for part in ("`mode`: should be 'auto', 'fused' or 'dial'", "alpha range '2:1'", "`vector_d"):
        assert part in text


def test_a_model_that_no_dial_was_tried_with(family: Family, vector: Path, tmp_path: Path) -> None:
    """Exit status 3, unless it is forced; by itself it is fused."""
    target = shutil.copytree(family.target, tmp_path / "target")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"model_type": "strange"}))
    both = ("--model", target, "--vector", vector)
    code, text = serve(*both, "--mode", "dial")
    assert code == 3
    assert "models of type 'strange' have not been tried in it" in text
    _, text = logged(*both, "--force")
    assert "mode fused: one engine for each alpha, for want of a dial: models of type" in text
    _, text = logged(*both, "--mode", "dial", "--force")
    assert "mode dial: forced, though models of type 'strange'" in text


@dataclass
class Answering:
    """An engine process, as far as the command looks at it."""

    base_url: str = "http://127.0.0.1:1"
    api_key: str = "k"


def server(mode: Literal["fused", "dial"], listener: socket.socket) -> _Server:
    """The command's parts, none of them started."""
    settings = load_config(None, {"model": "m", "vector": "a/v", "mode": mode})
    choice = choose_mode(settings)
    specs = plan_engines(settings, mode=choice.mode, environ={})
    made = _Server(
        settings,
        choice,
        Routing(),
        specs,
        listener=listener,
        console=EngineConsole(Console(quiet=True)),
    )
    for spec in specs:
        made._on_state(spec, EngineState.READY, "", Answering())  # type: ignore[arg-type]
    return made


def test_the_summary_of_a_dial(capsys: pytest.CaptureFixture[str]) -> None:
    """Its names, and what else may be asked for; the same as JSON."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made = server("dial", listener)
        made._print_summary(as_json=False)
        shown = " ".join(capsys.readouterr().out.split())
        assert "base (alpha 0)" in shown
        assert "enhanced@1 (alpha 1)" in shown
        assert "any alpha in -1:2: enhanced@A" in shown
        made._print_summary(as_json=True)
        printed = json.loads(capsys.readouterr().out)
        assert printed["models"] == ["base", "enhanced@1"]
        assert (printed["mode"], printed["alpha_range"]) == ("dial", [-1.0, 2.0])
        server("fused", listener)._print_summary(as_json=True)
        printed = json.loads(capsys.readouterr().out)
        assert (printed["mode"], printed["alpha_range"]) == ("fused", None)


def test_a_dials_restart_does_not_undo_a_change() -> None:
    """Its command line says the old alpha; the router, which has the new one, tells it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made = server("dial", listener)
        made._variants.retune("enhanced@1", (0.7,))
        (spec,) = made._specs
        for state in (EngineState.DOWN, EngineState.READY):
            made._on_state(spec, state, "", Answering())  # type: ignore[arg-type]
        facts = made._variants.facts("enhanced@1")
    assert facts is not None
    assert (facts.alpha, facts.vector, facts.alpha_range) == (0.7, "a/v", (-1, 2))


def test_routing_is_checked_against_the_mode(family: Family, vector: Path, tmp_path: Path) -> None:
    """Exit status 3: other alphas are for a dial, and the problem is named below `routing`."""
    path = tmp_path / "serve.yaml"
    path.write_text("routing: {aliases: {a: {split: {base: 1, enhanced@0.35: 1}}}}\n")
    both = ("--model", family.target, "--vector", vector, "--config", path)
    code, text = serve(*both, "--mode", "fused")
    assert code == 3
    assert "`routing.aliases.a.split`: there is no variant enhanced@0.35" in text


def test_beyond_this_machine_only_with_a_key(family: Family, vector: Path) -> None:
    """Exit status 3 before anything is verified, unless it is meant."""
    both = ("--model", family.target, "--vector", vector, "--host", "0.0.0.0")
    code, text = serve(*both)
    assert code == 3
    assert "0.0.0.0 would let anybody on the network in" in text


class Reading:
    """The file of a `serve` that runs, without engines."""

    def __init__(self, path: Path, mode: str, text: str, *, host: str = "127.0.0.1") -> None:
        self._path = path
        self._values = {"model": "m", "vector": "a/v", "mode": mode, "host": host}
        self.write(text)
        settings = self.load()
        self.server = _Server(
            settings,
            choose_mode(settings),
            routing_of(settings, path, is_dial=mode == "dial"),
            plan_engines(settings, mode=choose_mode(settings).mode, environ={}),
            listener=socket.socket(),
            console=EngineConsole(Console(quiet=True)),
        )
        self.server._listener.close()
        self.server.follow(path, settings, self.load, insecure=False)

    def load(self) -> ServeConfig:
        """Read it as the command does."""
        return load_config(self._path, self._values)

    def write(self, text: str) -> None:
        """Change the file."""
        self._path.write_text(text)

    def again(self, text: str) -> None:
        """Change it and take it in."""
        self.write(text)
        assert self.server._reload is not None
        self.server._reload[1]()()


def test_a_reload_takes_no_variant_that_does_not_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file may have one by now; requests dealt to it would find nobody."""
    aliases = "routing: {{aliases: {{a: {{split: {{base: 1, {}: 1}}}}}}}}\n"
    reading = Reading(tmp_path / "serve.yaml", "fused", aliases.format("enhanced@1"))
    more = "variants: {base: {alpha: 0}, enhanced@1: {alpha: 1}, more: {alpha: 2}}\n"
    with pytest.raises(ConfigError, match="there is no variant more; there are base, enhanced@1"):
        reading.again(more + aliases.format("more"))
    reading.again(more + aliases.format("enhanced@1"))
    assert "only what stands under `routing` is read again" in caplog.text


def test_a_reload_takes_new_aliases_only_with_a_dial(tmp_path: Path) -> None:
    """A fused engine learns at its start which names it answers to."""
    path, new = tmp_path / "serve.yaml", "routing: {aliases: {a: base}}\n"
    with pytest.raises(ConfigError, match="the aliases a are new"):
        Reading(path, "fused", "").again(new)
    Reading(path, "dial", "").again(new)


def test_a_reload_lets_nobody_in_by_accident(tmp_path: Path) -> None:
    """Beyond this machine, the last key stays."""
    keys = f"routing: {{keys: {{team: {{sha256: {'a' * 64}}}}}}}\n"
    reading = Reading(tmp_path / "serve.yaml", "dial", keys, host="0.0.0.0")
    with pytest.raises(ConfigError, match="would let anybody on the network in"):
        reading.again("")
    reading.again("routing: {insecure: true}\n")


def test_a_reload_says_what_takes_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A changed admin key, above all."""
    reading = Reading(tmp_path / "serve.yaml", "dial", "")
    reading.again(f"routing: {{admin_key_sha256: {'a' * 64}, results: {{path: r}}}}\n")
    assert "restart for what has changed in: admin_key_sha256, results" in caplog.text
