"""vllm_rvec.checkpoint.companions: what travels with a checkpoint's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_rvec.checkpoint.companions import MAX_COMPANION_BYTES, find_companions

if TYPE_CHECKING:
    from pathlib import Path

CARRIED = {
    "LICENSE",
    "NOTICE.txt",
    "USE_POLICY.md",
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors.index.json",
    "modeling_own.py",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
}
LEFT = {
    "consolidated.safetensors",
    "events.out.tfevents.1",
    "model.gguf",
    "optimizer.pt",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
}


def test_what_loads_a_model_is_carried_and_the_rest_is_named(tmp_path: Path) -> None:
    """No pickle, no training state, no second copy of the weights; nothing vanishes unsaid."""
    shard = tmp_path / "model-00001-of-00001.safetensors"
    hidden = {".gitattributes", "README.md"}
    for name in CARRIED | LEFT | hidden | {shard.name}:
        (tmp_path / name).write_text("x")
    (tmp_path / "original").mkdir()
    found = find_companions(tmp_path, {shard})
    assert {path.name for path in found.carried} == CARRIED
    assert set(found.left_behind) == LEFT | {"original"}


def test_a_link_counts_as_what_it_points_to(tmp_path: Path) -> None:
    """The Hub's cache is made of links; one that leads nowhere is left behind."""
    (tmp_path / "blob").write_text("{}")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "config.json").symlink_to(tmp_path / "blob")
    (folder / "tokenizer.json").symlink_to(tmp_path / "nothing")
    found = find_companions(folder, ())
    assert [path.name for path in found.carried] == ["config.json"]
    assert found.left_behind == ("tokenizer.json",)


def test_no_companion_is_as_large_as_weights(tmp_path: Path) -> None:
    """A file of text names with the size of weights is not read into memory."""
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(MAX_COMPANION_BYTES + 1)
    assert find_companions(tmp_path, ()).left_behind == ("tokenizer.json",)
