"""vllm_rvec.vector.module_names: layer and kind from names alone."""

from __future__ import annotations

import pytest

from vllm_rvec.vector.module_names import place_of


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.weight", 3, "q"),
        ("model.layers.3.self_attn.q_proj.bias", 3, "biases"),
        ("model.layers.3.self_attn.q_norm.weight", 3, "norms"),
        ("model.layers.3.post_attention_layernorm.weight", 3, "norms"),
        ("model.layers.12.self_attn.qkv_proj.weight", 12, "qkv"),
        ("model.layers.12.mlp.gate_up_proj.weight", 12, "gate_up"),
        ("model.layers.0.mlp.gate_proj.weight", 0, "gate"),
        ("transformer.h.5.attn.c_attn.weight", 5, "qkv"),
        ("h.5.attn.c_proj.weight", 5, "o"),
        ("h.5.mlp.c_proj.weight", 5, "down"),
        ("h.5.mlp.c_fc.bias", 5, "biases"),
        ("h.5.ln_1.bias", 5, "norms"),
        ("model.layers.1.block_sparse_moe.experts.7.w2.weight", 1, "experts"),
        ("model.layers.1.block_sparse_moe.gate.weight", 1, "router"),
        ("model.layers.1.mlp.experts.gate_up_proj", 1, "experts"),
        ("model.layers.1.mlp.shared_experts.up_proj.weight", 1, "shared"),
        ("model.layers.1.mlp.gate.e_score_correction_bias", 1, "router"),
        ("model.layers.1.self_attn.kv_a_proj_with_mqa.weight", 1, "kv"),
        ("model.layers.1.self_attn.q_b_proj.weight", 1, "q"),
        ("model.layers.1.self_attn.kv_a_layernorm.weight", 1, "norms"),
        ("model.embed_tokens.weight", None, "embedding"),
        ("lm_head.weight", None, "head"),
        ("model.norm.weight", None, "norms"),
        ("model.layers.4.mixer.A_log", 4, "A_log"),
        ("model.vision.projector.weight", None, "projector"),
        ("weight", None, "other"),
        ("7", 7, "other"),
        ("layers.99999999999999999999.q_proj.weight", None, "q"),
        ("layers.\u0661.q_proj.weight", None, "q"),
        ("..", None, ""),
    ],
)
def test_a_name_tells_layer_and_kind(name: str, layer: int | None, kind: str) -> None:
    """The common families are known; what is not known is called by its own last module."""
    assert place_of(name) == (layer, kind)


def test_no_name_is_too_long() -> None:
    """A megabyte of digits is no layer, and no crash."""
    assert place_of("layers." + "9" * 1_000_000 + ".up_proj.weight") == (None, "up")
