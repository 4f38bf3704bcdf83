"""vllm_rvec.cli.heatmap: the picture of a vector."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from vllm_rvec.cli.heatmap import check_plot, save_heatmap
from vllm_rvec.errors import ConfigError
from vllm_rvec.vector import Manifest, TensorEntry
from vllm_rvec.vector.statistics import Spectrum, Statistics

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")]
)
def test_the_suffix_chooses_the_format(
    suffix: str, start: bytes, vector: Path, tmp_path: Path
) -> None:
    """A picture in each format, over the one that was there."""
    path = tmp_path / f"picture{suffix}"
    path.write_text("old")
    check_plot(path)
    save_heatmap(Statistics(Manifest.read(vector)), "v", path)
    assert path.read_bytes().startswith(start)


def test_text_of_others_is_not_typeset(vector: Path, tmp_path: Path) -> None:
    """Mathematics, control characters and scripts that no font has are drawn as text."""
    entry = TensorEntry(shape=(2, 2), dtype="F32", encoding="dense", norm=1.0, base_norm=2.0)
    names = ("layers.1.$\\frac{$.weight", "\x1b$^{$", "layers.2.\U0001f600$.weight")
    manifest = Manifest.read(vector).model_copy(update={"tensors": dict.fromkeys(names, entry)})
    path = tmp_path / "picture.svg"
    save_heatmap(Statistics(manifest), "$x_{$ \x07 \u4e2d", path)
    assert path.stat().st_size > 1000


@pytest.mark.parametrize("names", [(), ("weight",), ("layers.3.q_proj.weight",)])
def test_few_tensors_make_a_picture_too(
    names: tuple[str, ...], vector: Path, tmp_path: Path
) -> None:
    """None at all, none in layers, none outside; nothing known of them."""
    entry = TensorEntry(shape=(2, 2), dtype="F32", encoding="dense")
    manifest = Manifest.read(vector).model_copy(update={"tensors": dict.fromkeys(names, entry)})
    save_heatmap(Statistics(manifest), "v", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()


def test_absurd_norms_make_a_picture_too(vector: Path, tmp_path: Path) -> None:
    """A manifest may claim any two numbers."""
    claims = ((1e300, 1e-5), (1e-320, 1e300), (1.0, 1.0))
    entries = {
        f"layers.{n}.q_proj.weight": TensorEntry(
            shape=(2, 2), dtype="F32", encoding="dense", norm=norm, base_norm=base, changed=1 << 48
        )
        for n, (norm, base) in enumerate(claims)
    }
    manifest = Manifest.read(vector).model_copy(update={"tensors": entries})
    save_heatmap(Statistics(manifest), "v", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()


def test_what_is_known_has_a_panel(vector: Path, tmp_path: Path) -> None:
    """The energy of singular values is drawn where it was computed."""
    manifest = Manifest.read(vector)
    spectra = {"model.layers.0.mlp.up_proj.weight": Spectrum((1.0,), 2.0)}
    texts = []
    for number, given in enumerate(({}, spectra)):
        path = tmp_path / f"{number}.svg"
        save_heatmap(Statistics(manifest, given), "v", path)
        texts.append(path.read_text())
    assert ["energy in the top 16" in text for text in texts] == [False, True]


def test_a_name_without_a_format_is_refused(tmp_path: Path) -> None:
    """With those that there are."""
    with pytest.raises(ConfigError, match=r"\.png, \.svg, \.pdf"):
        check_plot(tmp_path / "picture")


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """A folder that is not there, a folder by that name, a name that no system has."""
    (tmp_path / "folder.png").mkdir()
    for path in ("nothing/a.png", "folder.png", "a\0.png", "x" * 300 + ".png"):
        with pytest.raises(ConfigError, match="can't be written"):
            check_plot(tmp_path / path)


def test_without_matplotlib_the_command_to_install_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an optional extra."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'vllm-rvec\[plot\]'"):
        check_plot(tmp_path / "a.png")


def test_a_disk_that_is_full_leaves_the_picture_before(
    vector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no half of the new one."""
    picture = tmp_path / "a.png"
    picture.write_bytes(b"before")

    def no_room(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", no_room)
    with pytest.raises(ConfigError, match="No space left"):
        save_heatmap(Statistics(Manifest.read(vector)), "v", picture)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert picture.read_bytes() == b"before"
