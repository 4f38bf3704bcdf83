"""Reloading in place, as vLLM does it for a change of alpha and for the wake from level-2 sleep."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.support.web import run_web
from vllm_rvec.errors import AlphaChangeFailedError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Family

CHANGES = 100
COMPARED_EVERY = 20
LINEAR = "cpu_linear"
"""What vLLM's CPU build puts on each linear layer, closed over the weights where it packs them."""


class LiveModel:
    """A whole model of vLLM's in this process: loaded, and made into the kernels' layout."""

    def __init__(
        self, target: Path, vector: Path | str, alpha: float, dtype: str = "bfloat16"
    ) -> None:
        # vLLM takes seconds to import; tests that are deselected should not pay.
        from tests.support.vllm_model import LoadedModel, engine_config

        self._extra: dict[str, object] = {"vector": str(vector), "alpha": alpha}
        self.loaded = LoadedModel(engine_config(target, "rvec", self._extra, dtype))
        self.worker = self.loaded.worker
        self.worker.rvec_note_files()

    def change(self, alpha: float) -> int:
        """Do what a live engine's worker does."""
        assert self.worker.rvec_check() == []
        return self.worker.rvec_reload(self._extra | {"alpha": alpha})

    def digests(self) -> dict[str, str]:
        """Digest every parameter and buffer, and what each linear layer makes of the unit matrix.

        Where vLLM's CPU build packs a layer it leaves the parameter empty; times 1 and plus 0 are
        exact, so the product is the packed weight itself.
        """
        model = self.loaded.model
        named = dict(model.named_parameters(remove_duplicate=False))
        named |= dict(model.named_buffers(remove_duplicate=False))
        found = {name: tensor.data for name, tensor in named.items()}
        layers = dict(model.named_modules()).items()
        found |= {f"{n}.unit": self._unit(layer) for n, layer in layers if hasattr(layer, LINEAR)}
        return {name: _digest(tensor) for name, tensor in found.items()}

    def _unit(self, layer: Any) -> torch.Tensor:
        columns = getattr(layer, "input_size_per_partition", None) or layer.embedding_dim
        unit = torch.eye(columns, dtype=self.loaded.dtype)
        product: torch.Tensor = getattr(layer, LINEAR)(unit, layer.weight, None)
        return product


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def test_a_hundred_changes_leave_no_trace(family: Family, vector: Path) -> None:
    """On the way each equals a fresh load at its alpha; back at the first, all is as it was."""
    live = LiveModel(family.target, vector, 0.3)
    first = live.digests()
    assert sum(name.endswith(".unit") for name in first) > 8, "layers are packed another way"
    choose = random.Random(20261124)  # noqa: S311 - alphas, no secrets
    for number in range(CHANGES):
        alpha = choose.choice([0.0, 1.0, -1.0, choose.uniform(-2, 2)])
        assert (live.change(alpha) == 0) == (alpha == 0)
        if number % COMPARED_EVERY == 0:
            changed = live.digests()
            assert changed == LiveModel(family.target, vector, alpha).digests()
            assert changed != first
    live.change(0.3)
    assert live.digests() == first


def test_alpha_zero_is_the_target_after_a_change_too(family: Family, vector: Path) -> None:
    """Bit for bit what a load at alpha 0 gives, in float32."""
    live = LiveModel(family.target, vector, 1.0, "float32")
    live.change(0.0)
    assert live.digests() == LiveModel(family.target, vector, 0.0, "float32").digests()


def test_the_wake_from_level_2_sleep_keeps_the_vector(family: Family, vector: Path) -> None:
    """The memory is discarded, and `reload_weights` fills it again: vLLM's own sequence."""
    live = LiveModel(family.target, vector, 0.3)
    before = live.digests()
    live.loaded.discard()
    assert live.digests() != before
    live.worker.reload_weights()
    assert live.digests() == before


def test_the_wake_after_a_change_keeps_the_new_alpha(family: Family, vector: Path) -> None:
    """What the worker's configuration says counts, and a change is written there."""
    live = LiveModel(family.target, vector, 1.0)
    live.change(-0.7)
    before = live.digests()
    live.loaded.discard()
    live.worker.reload_weights()
    assert live.digests() == before


def test_a_vector_that_its_url_names_anew_is_not_reloaded(
    family: Family, vector: Path, vector_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change would be one of the vector too, and nobody asked for that."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with run_web() as web:
        live = LiveModel(family.target, web.add_folder("/v", vector), 0.3)
        assert live.worker.rvec_check() == []
        web.add_folder("/v", vector_bf16)
        (problem,) = live.worker.rvec_check()
        assert "another vector than the one that was loaded" in problem
        with pytest.raises(AlphaChangeFailedError, match="another vector"):
            live.worker.rvec_reload({"vector": str(vector), "alpha": 1.0})
