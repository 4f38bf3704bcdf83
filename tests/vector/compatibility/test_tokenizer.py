"""vllm_rvec.vector.compatibility.tokenizer: same token for same id."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from tests.support.variations import write_tokenizer
from vllm_rvec.vector.compatibility import Level, Verdict
from vllm_rvec.vector.compatibility.tokenizer import (
    RENAMED_SHARE,
    RENAMED_TOKENS,
    fingerprint,
    read_tokens,
    tokenizer_level,
)

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_rvec.vector.manifest import TokenizerFingerprint

COUNT = 20_000
TOKENS = [f"token {i}" for i in range(COUNT)]


@pytest.fixture(scope="module")
def donors(tmp_path_factory: pytest.TempPathFactory) -> TokenizerFingerprint:
    """The fingerprint of 20,000 tokens, the last of them an added one."""
    folder = tmp_path_factory.mktemp("donor")
    write_tokenizer(folder, TOKENS[:-1], {COUNT - 1: TOKENS[-1]})
    found = fingerprint(folder)
    assert found is not None
    return found


def compare(donors: TokenizerFingerprint, tokens: list[str], folder: Path) -> Level:
    return tokenizer_level(donors, write_tokenizer(folder, tokens))


def renamed(count: int) -> list[str]:
    return [f"other {i}" for i in range(count)] + TOKENS[count:]


def test_the_donors_own_file_passes_unparsed(donors: TokenizerFingerprint, tmp_path: Path) -> None:
    """Equal bytes are equal tokens, whatever a parser would say of them."""
    odd = tmp_path / "tokenizer.json"
    odd.write_text("no JSON")
    import blake3

    same = donors.model_copy(update={"blake3": blake3.blake3(b"no JSON").hexdigest()})
    level = tokenizer_level(same, odd)
    assert level.verdict is Verdict.PASS
    assert level.numbers["shared_ids"] == pytest.approx(COUNT, abs=3)
    assert tokenizer_level(donors, odd).verdict is Verdict.WARN


def test_the_same_tokens_in_another_file_pass(donors: TokenizerFingerprint, tmp_path: Path) -> None:
    """Added or in the vocabulary, and in whatever order: the ids count."""
    level = compare(donors, TOKENS, tmp_path)
    assert level.verdict is Verdict.PASS
    assert level.numbers["differing_ids"] == 0
    assert level.summary.endswith("shared ids agree")


def test_one_other_token_is_a_warning_that_shows_it(
    donors: TokenizerFingerprint, tmp_path: Path
) -> None:
    """The id and the target's own text, as Python writes it."""
    tokens = [*TOKENS[:7], "<\x1b[31m\u202e>", *TOKENS[8:]]
    level = compare(donors, tokens, tmp_path)
    assert level.verdict is Verdict.WARN
    assert level.numbers["differing_ids"] == 1
    assert level.findings[1].text == (r"id 7: '<\x1b[31m\u202e>' in the target, not in the donors")


def test_two_tokens_that_changed_places_differ(
    donors: TokenizerFingerprint, tmp_path: Path
) -> None:
    """The set of tokens is the same; what ids mean is not."""
    level = compare(donors, [TOKENS[1], TOKENS[0], *TOKENS[2:]], tmp_path)
    assert (level.verdict, level.numbers["differing_ids"]) == (Verdict.WARN, 2)


def test_a_handful_of_renamed_tokens_is_a_warning_and_more_a_refusal(
    donors: TokenizerFingerprint, tmp_path: Path
) -> None:
    """On both sides of the share that is allowed; five are shown."""
    allowed = int(RENAMED_SHARE * COUNT)
    assert compare(donors, renamed(allowed - 2), tmp_path).verdict is Verdict.WARN
    refused = compare(donors, renamed(allowed + 2), tmp_path)
    assert refused.verdict is Verdict.REFUSE
    assert len(refused.findings) == 6
    assert "shared ids differ" in refused.summary


def test_a_small_vocabulary_may_rename_a_few_too(tmp_path: Path) -> None:
    """A share of 0.2 % would be none of 512."""
    write_tokenizer(tmp_path, TOKENS[:512])
    small = fingerprint(tmp_path)
    assert small is not None
    for count, verdict in ((RENAMED_TOKENS, Verdict.WARN), (RENAMED_TOKENS + 1, Verdict.REFUSE)):
        tokens = renamed(count)[:512]
        assert compare(small, tokens, tmp_path / "target").verdict is verdict


def test_tokens_of_a_vocabulary_trained_apart_are_refused(
    donors: TokenizerFingerprint, tmp_path: Path
) -> None:
    """Nearly every id differs."""
    level = compare(donors, [text.replace("token", "piece") for text in TOKENS], tmp_path)
    assert level.verdict is Verdict.REFUSE
    assert level.numbers["differing_ids"] == pytest.approx(COUNT, abs=5)


@pytest.mark.parametrize(("count", "who"), [(COUNT - 64, "donors"), (COUNT + 64, "target")])
def test_ids_of_one_side_only_are_a_warning(
    donors: TokenizerFingerprint, tmp_path: Path, count: int, who: str
) -> None:
    """Padding and added tokens: how many, and where they begin."""
    tokens = [f"token {i}" for i in range(count)]
    level = compare(donors, tokens, tmp_path)
    (warning,) = level.texts(Verdict.WARN)
    assert warning == f"64 ids only the {who} have, the first is {min(count, COUNT)}"
    assert level.verdict is Verdict.WARN


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[" * 100_000,
        b"{}",
        b'{"model": {"vocab": {"a": "0"}}}',
        b'{"model": {"vocab": {"a": -1}}}',
        b'{"model": {"vocab": {"a": 1, "a": 2}}}',
        b'{"model": {"vocab": {"a": true}}}',
        b'{"model": {"vocab": {}}, "added_tokens": [{"id": [], "content": ""}]}',
        b'{"model": {"vocab": {"a": 99999999999}}}',
        b"\xff\xfe",
    ],
)
def test_a_file_that_is_no_tokenizer_is_a_warning(
    donors: TokenizerFingerprint, tmp_path: Path, content: bytes
) -> None:
    """Whatever it holds, nothing breaks and nothing passes."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    assert read_tokens(path) is None
    level = tokenizer_level(donors, path)
    assert level.verdict is Verdict.WARN
    assert "can't be read" in level.findings[0].text


def test_a_pipe_is_no_tokenizer(tmp_path: Path) -> None:
    """Nobody waits for a writer."""
    os.mkfifo(tmp_path / "tokenizer.json")
    assert fingerprint(tmp_path) is None


def test_one_high_id_costs_no_time(donors: TokenizerFingerprint, tmp_path: Path) -> None:
    """Sixteen million ids without a token are not sixteen million hashes."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": {"token 0": 0, "far": (1 << 24) - 1}}}))
    level = tokenizer_level(donors, path)
    assert level.numbers["ids_of_target_only"] == 1
    assert level.numbers["differing_ids"] == 0


def test_a_side_without_tokenizer_is_a_warning_that_says_which(
    donors: TokenizerFingerprint, tmp_path: Path
) -> None:
    """The manifest's, or the target's."""
    for level, who in (
        (tokenizer_level(None, write_tokenizer(tmp_path, TOKENS)), "the vector's manifest"),
        (tokenizer_level(donors, tmp_path / "none" / "tokenizer.json"), "the target"),
        (tokenizer_level(donors, None), "the target"),
    ):
        assert level.verdict is Verdict.WARN
        assert who in level.findings[0].text


def test_a_list_vocabulary_is_read(tmp_path: Path) -> None:
    """Unigram models have tokens with scores, in the order of ids."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": [["a", -1.5], ["b", -2]]}}))
    assert read_tokens(path) == {0: "a", 1: "b"}
