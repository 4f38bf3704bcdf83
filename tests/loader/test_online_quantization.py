"""Online quantization on top: vLLM quantizes the sum, layer by layer, while it loads.

On a CPU without AMX vLLM 0.32 has one method for linear layers: fp8 per channel. tests/gpu has
others.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.support.checkpoints import make_merged
from tests.support.families import KINDS, make_family
from vllm_rvec.loader.fused_tensor import FusedTensor
from vllm_rvec.vector.extract import extract

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from tests.support.checkpoints import Family

METHOD = "fp8_per_channel"
Quantized = dict[str, torch.Tensor]


class Online:
    """A model whose linear layers are quantized as they are loaded."""

    def __init__(self, model: Path, load_format: str = "auto", **extra: Any) -> None:
        from vllm.model_executor.model_loader import get_model_loader

        from tests.support.vllm_model import CreatedModel, engine_config

        self.config = engine_config(model, load_format, extra, "bfloat16", quantization=METHOD)
        self.loader: Any = get_model_loader(self.config.load_config)
        self.created = CreatedModel(self.config)

    def parameters(self) -> Quantized:
        """Load, quantize, and give every parameter as kernels take it."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_processing
        from vllm.model_executor.model_loader.utils import process_weights_after_loading

        self.created.load(self.loader)
        model, model_config = self.created.model, self.config.model_config
        with set_current_vllm_config(self.config):
            finalize_layerwise_processing(model, model_config)
            process_weights_after_loading(model, model_config, torch.device("cpu"))
        return {name: parameter.data for name, parameter in model.named_parameters()}


def assert_same(ours: Quantized, theirs: Quantized) -> None:
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.numel(), f"{name} was emptied: nothing to compare"
        same = torch.equal(
            parameter.contiguous().view(torch.uint8), theirs[name].contiguous().view(torch.uint8)
        )
        assert same, name


@pytest.mark.parametrize("alpha", [0.0, 0.3, -1.0])
def test_the_sum_is_what_is_quantized(
    family: Family, vector: Path, alpha: float, tmp_path: Path
) -> None:
    """Codes and scales are those of the merged checkpoint, bit for bit, not of the target."""
    fused = Online(family.target, "rvec", vector=str(vector), alpha=alpha)
    parameters = fused.parameters()
    codes = [name for name, p in parameters.items() if p.dtype == torch.float8_e4m3fn]
    assert len(codes) == 8
    assert not fused.loader.stream.ledger.materialized
    merged = make_merged(family.target, vector, alpha, tmp_path / "merged", torch.bfloat16)
    assert_same(parameters, Online(merged).parameters())
    plain = Online(family.target).parameters()
    same = [torch.equal(parameters[n].view(torch.uint8), plain[n].view(torch.uint8)) for n in codes]
    assert all(same) if alpha == 0 else not any(same)


def test_vectors_that_are_decoded_are_quantized_alike(family: Family, tmp_path: Path) -> None:
    """What is not dense is decoded when its layer is quantized, and gives the same codes."""
    sparse = extract(family.tuned, family.base, tmp_path / "v", encoding="sparse").output
    dense = extract(family.tuned, family.base, tmp_path / "d", encoding="dense").output
    fused = Online(family.target, "rvec", vector=str(sparse), alpha=0.3).parameters()
    assert_same(fused, Online(family.target, "rvec", vector=str(dense), alpha=0.3).parameters())


def test_no_more_than_one_layers_sums_wait(tmp_path: Path) -> None:
    """VLLM holds back what belongs to one packed layer; then it is quantized and let go.

    Where q, k and v have biases beside them (Qwen2) vLLM 0.32 holds theirs back to the end.
    """
    family = make_family(tmp_path, KINDS["qwen3"], num_hidden_layers=3)
    vector = extract(family.tuned, family.base, tmp_path / "v", encoding="dense").output
    online = Online(family.base, "rvec", vector=str(vector), alpha=0.3)
    waiting: list[int] = []
    gc.collect()
    others = sum(type(item) is FusedTensor for item in gc.get_objects())  # of other tests

    def counted(
        weights: Iterable[tuple[str, torch.Tensor]],
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for pair in weights:
            yield pair
            del pair
            alive = sum(type(item) is FusedTensor for item in gc.get_objects())
            waiting.append(alive - others)

    from vllm.config import set_current_vllm_config

    model: Any = online.created.model
    with set_current_vllm_config(online.config):
        model.load_weights(
            counted(online.loader.get_all_weights(online.config.model_config, model))
        )
    # q, k and v, and the one in hand.
    assert len(waiting) == 3 * 11 + 2
    assert max(waiting) <= 4
