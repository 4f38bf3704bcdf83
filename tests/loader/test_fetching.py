"""vllm_rvec.loader.fetching: what an engine's log says while a vector is fetched."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from tests.support.processes import until
from tests.support.web import run_web
from vllm_rvec.loader import fetching
from vllm_rvec.loader.fetching import find_vector

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_a_slow_fetch_is_told_and_so_is_waiting_for_one(
    vector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Under the one name that vLLM gives handlers to; the second thread is another rank."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(fetching, "FIRST_LINE_SECONDS", 0.0)
    with run_web() as web, caplog.at_level(logging.INFO, "vllm.rvec"):
        web.stall = threading.Event()
        url = web.add_folder("/v", vector)
        folders: list[Path] = []
        ranks = [
            threading.Thread(target=lambda: folders.append(find_vector(url).folder))
            for _ in range(2)
        ]
        for rank in ranks:
            rank.start()
        until(lambda: "waiting for another process" in caplog.text, "one waits")
        web.stall.set()
        for rank in ranks:
            rank.join(30)
    assert len(folders) == 2
    assert len(set(folders)) == 1
    assert len(web.asked("vector.safetensors")) == 1
    lines = [record.message for record in caplog.records if record.name == "vllm.rvec"]
    assert any(line.startswith("Fetching the vector: 0 of 0 MB") for line in lines), lines


def test_a_fast_one_is_not(
    vector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two seconds are nothing beside an engine's start."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with run_web() as web, caplog.at_level(logging.INFO, "vllm.rvec"):
        find_vector(web.add_folder("/v", vector))
    assert not caplog.records
