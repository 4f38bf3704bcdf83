"""vllm_rvec.cli.inspect: the command around the statistics."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from vllm_rvec.cli.inspect import inspect_command
from vllm_rvec.cli.inspect_tables import layers_table, percent
from vllm_rvec.cli.printable import printable
from vllm_rvec.errors import VectorNotFoundError
from vllm_rvec.vector import Manifest
from vllm_rvec.vector.manifest import Donor
from vllm_rvec.vector.statistics import Statistics
from vllm_rvec.vector.writer import write_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result

app = typer.Typer()
app.command()(inspect_command)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "100"})


@pytest.fixture
def hostile(vector: Path, tmp_path: Path) -> Path:
    """A vector whose names are markup, control characters, mathematics and huge numbers."""
    folder = tmp_path / "$x_{"
    shutil.copytree(vector, folder, ignore=shutil.ignore_patterns("vector.json"))
    manifest = Manifest.read(vector)
    zero = manifest.tensors["model.norm.weight"].model_copy(
        update={"encoding": "zero", "shape": (1, 2), "norm": 1e308, "base_norm": 1e-308}
    )
    names = ["[red]x[/nope]", "$\\frac{$", "layers.999999.$q_{.weight", "\U0001f600"]
    names += [f"layers.{n}.[bold]{n}.weight" for n in range(300)]
    donors = manifest.donors.model_copy(update={"tuned": Donor(id="[link=x]\x1b]0;owned\x07")})
    changes = {
        "tensors": manifest.tensors | dict.fromkeys(names, zero),
        "donors": donors,
        "tool": "\r\n[bold]\u202etool",
    }
    write_manifest(folder, manifest.model_copy(update=changes))
    return folder


def test_the_tables_say_what_it_is_and_where_it_is_large(vector: Path) -> None:
    """Donors, exactness, kinds, layers; singular values of a small vector at once."""
    done = run(vector)
    assert done.exit_code == 0, done.output
    for expected in ("tuned (license: not known)", "bit for bit", "embedding", "rank 90", "layer"):
        assert expected in done.output
    assert max(len(line) for line in done.output.splitlines()) <= 100


def test_json_has_every_tensor_and_every_sum(vector: Path) -> None:
    """One object; sums agree with the tensors."""
    done = run(vector, "--json")
    told = json.loads(done.stdout)
    manifest = Manifest.read(vector)
    assert set(told["tensors"]) == set(manifest.tensors)
    assert told["total"]["weights"] == sum(e.elements for e in manifest.tensors.values())
    assert [layer["layer"] for layer in told["layers"]] == [0, 1]
    assert told["no_layer"]["tensors"] == 2
    up = told["tensors"]["model.layers.1.mlp.up_proj.weight"]
    assert (up["layer"], up["kind"]) == (1, "up")
    assert 0 < up["energy"]["1"] < up["energy"]["16"] < up["energy"]["64"] <= 1.000001
    assert told["donors"]["tuned"]["files"]
    assert sum(cell["tensors"] for cell in told["cells"]) == len(manifest.tensors)


def test_without_the_spectrum_no_torch_is_loaded(vector: Path) -> None:
    """The manifest is read in an instant."""
    code = (
        "import sys; from vllm_rvec.cli.inspect import inspect_command; "
        f"inspect_command({str(vector)!r}, spectrum=False); "
        "print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_large_vector_waits_to_be_asked(vector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would take long is not done unasked, and the command says so."""
    monkeypatch.setattr("vllm_rvec.cli.inspect.QUICK_WEIGHTS", 1000)
    done = run(vector, "--json")
    assert "--spectrum" in done.stderr
    assert "energy" not in json.loads(done.stdout)["total"]
    asked = run(vector, "--json", "--spectrum")
    assert asked.stderr.strip() == ""
    assert "energy" in json.loads(asked.stdout)["total"]


def test_encodings_are_compared(vector: Path) -> None:
    """Each choice, its bytes and what it loses."""
    told = json.loads(run(vector, "--json", "--no-spectrum", "--encodings").stdout)
    by_name = {cost["encoding"]: cost for cost in told["encodings"]}
    assert by_name["dense F32"]["of_dense_float32"] == 1
    assert by_name["lowrank 16 F32"]["error"] > 0.1 > by_name["int8 F32"]["error"] > 0


def test_hostile_names_are_shown_as_they_are(hostile: Path) -> None:
    """No markup, no control character reaches the terminal, and nothing is dropped."""
    done = run(hostile)
    assert done.exit_code == 0, str(done.exception)
    assert "[red]x[/nope]" in run(hostile, "--json").stdout
    assert "[link=x]\\x1b]0;owned\\x07" in done.output
    assert not {c for c in done.output if not c.isprintable()} - {"\n"}
    assert max(len(line) for line in done.output.splitlines()) <= 100


def test_a_hostile_vector_is_drawn(hostile: Path, tmp_path: Path) -> None:
    """What looks like mathematics in a name is not typeset."""
    done = run(hostile, "--no-spectrum", "--plot", tmp_path / "a.png")
    assert done.exit_code == 0, str(done.exception)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_is_refused_before_the_vector_is_looked_for(tmp_path: Path) -> None:
    """An unknown suffix costs no minutes."""
    done = run(tmp_path / "nothing", "--plot", tmp_path / "a.gif")
    assert "no picture format" in str(done.exception)


def test_a_missing_vector_is_said(tmp_path: Path) -> None:
    """The exit status is 5, by the class."""
    assert isinstance(run(tmp_path / "nothing" / "there").exception, VectorNotFoundError)


def test_the_terminal_shows_heat(vector: Path) -> None:
    """Cells have colours from dark to bright where the terminal has them."""
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, color_system="truecolor", width=80)
    console.print(layers_table(Statistics(Manifest.read(vector)), 80))
    assert "48;2;24;35;78m" in drawn.getvalue()
    assert "48;2;253;231;37m" in drawn.getvalue()


def test_shares_are_short() -> None:
    """A cell of the table has six characters."""
    shares = (1, 9.99, 12345.0, 0.999, 0.0999, 0.00999, 1e-4, 1e-5, 1e-9, 1e-300, 1e300, 0, None)
    assert all(len(percent(share)) <= 6 for share in shares)


def test_long_text_is_cut_and_escaped() -> None:
    """A name of a megabyte is one line."""
    assert len(printable("x" * 1_000_000)) == 80
    assert printable("\ud800\n") == "\\ud800\\n"
