"""Whether two checkpoints have the same token for the same id. Imports no torch.

A vector moves embedding rows and everything that reads them: added to a target whose ids mean other
tokens, it moves the wrong ones.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import blake3
import numpy as np

from vllm_rvec.checkpoint.table import without_duplicates
from vllm_rvec.vector.compatibility.report import Finding, Level, passed, refused, warned
from vllm_rvec.vector.manifest import HASH_BYTES, TokenizerFingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import numpy.typing as npt

__all__ = [
    "RENAMED_SHARE",
    "RENAMED_TOKENS",
    "TOKENIZER_NAME",
    "fingerprint",
    "read_tokens",
    "tokenizer_level",
]

TOKENIZER_NAME = "tokenizer.json"
MAX_TOKENIZER_BYTES = 256 << 20
MAX_TOKENS = 1 << 24
"""Ids beyond are not those of a vocabulary."""

RENAMED_TOKENS = 16
RENAMED_SHARE = 0.002
"""Up to 16 ids, or 0.2 % of those that both sides have, may stand for another token with no more
than a warning: families rename their special tokens (DeepSeek-R1's distillations of Qwen2.5 some
twenty of 151,665; Llama 3 reserves 256 of 128,256). More is refused: vocabularies that were trained
apart differ nearly everywhere, so nothing depends on where exactly the line is."""

SHOWN_TOKENS = 5
SHOWN_CHARACTERS = 40
"""How many differing ids are shown, and how much of a token's text."""


def fingerprint(folder: Path) -> TokenizerFingerprint | None:
    """Take short hashes of a checkpoint's tokens.

    Args:
        folder: The checkpoint's folder.

    Returns:
        None where there is no tokenizer.json that can be read: other files need other software.
    """
    path = folder / TOKENIZER_NAME
    tokens = read_tokens(path)
    if tokens is None:
        return None
    return TokenizerFingerprint(
        file=TOKENIZER_NAME,
        blake3=_digest(path),
        hashes=base64.b64encode(_hashes(tokens)).decode(),
    )


def read_tokens(path: Path) -> dict[int, str] | None:
    """Read the token of each id from a tokenizer.json; None where it is no such file."""
    try:
        # Asked before it is opened: a pipe would have the reader wait for a writer.
        if not path.is_file() or path.stat().st_size > MAX_TOKENIZER_BYTES:
            return None
        found = json.loads(path.read_bytes(), object_pairs_hook=without_duplicates)
        tokens = _vocabulary(found["model"]["vocab"])
        tokens |= {entry["id"]: entry["content"] for entry in found.get("added_tokens") or ()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    is_sound = all(
        type(i) is int and 0 <= i < MAX_TOKENS and type(text) is str for i, text in tokens.items()
    )
    return tokens if is_sound else None


def tokenizer_level(ours: TokenizerFingerprint | None, path: Path | None) -> Level:
    """Compare the donors' tokens with a target's.

    Args:
        ours: The manifest's fingerprint.
        path: The target's tokenizer.json, which need not exist; None where it is not known.

    Returns:
        pass for equal files or equal tokens; refuse where more ids differ than `RENAMED_TOKENS`
        and `RENAMED_SHARE` allow; warn for fewer, for ids that one side lacks, and where there is
        nothing to compare.
    """
    if ours is None:
        return _unknown("the vector's manifest has no tokenizer fingerprint")
    if path is None or not path.is_file():
        return _unknown(f"the target has no {TOKENIZER_NAME}; other tokenizer files are not read")
    if _is_same_file(path, ours.blake3):
        same = passed(f"{TOKENIZER_NAME} is the donors' own, byte for byte")
        shared = int(np.count_nonzero(_padded(ours.packed_hashes) != _NO_TOKEN))
        return Level("tokenizer", "the donors' own file", (same,), _numbers(0, 0, 0, shared))
    tokens = read_tokens(path)
    if tokens is None:
        return _unknown(f"the target's {TOKENIZER_NAME} can't be read")
    return _compared(_Comparison.of(ours, tokens), tokens)


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Which token ids are in both, in one, and not the same."""

    shared: int
    differing: npt.NDArray[np.int64]
    only_donors: npt.NDArray[np.int64]
    only_target: npt.NDArray[np.int64]

    @classmethod
    def of(cls, ours: TokenizerFingerprint, tokens: Mapping[int, str]) -> _Comparison:
        packed, theirs = ours.packed_hashes, _hashes(tokens)
        size = max(len(packed), len(theirs)) // HASH_BYTES
        a, b = (_padded(side, size) for side in (packed, theirs))
        in_a, in_b = a != _NO_TOKEN, b != _NO_TOKEN
        both = in_a & in_b
        return cls(
            shared=int(np.count_nonzero(both)),
            differing=np.flatnonzero(both & (a != b)),
            only_donors=np.flatnonzero(in_a & ~in_b),
            only_target=np.flatnonzero(in_b & ~in_a),
        )

    @property
    def is_another(self) -> bool:
        return len(self.differing) > max(RENAMED_TOKENS, RENAMED_SHARE * self.shared)


def _compared(found: _Comparison, tokens: Mapping[int, str]) -> Level:
    if found.shared == 0:
        return _unknown("donors and target have no token id in common")
    count = len(found.differing)
    summary = (
        f"{count:,} of {found.shared:,} shared ids differ"
        if count
        else f"all {found.shared:,} shared ids agree"
    )
    numbers = _numbers(count, len(found.only_donors), len(found.only_target), found.shared)
    return Level("tokenizer", summary, tuple(_evidence(found, tokens, summary)), numbers)


def _evidence(found: _Comparison, tokens: Mapping[int, str], summary: str) -> Iterator[Finding]:
    make = refused if found.is_another else warned
    yield make(summary) if len(found.differing) else passed(summary)
    for token_id in found.differing[:SHOWN_TOKENS].tolist():
        yield make(f"id {token_id}: {_shown(tokens[token_id])} in the target, not in the donors")
    for ids, side in ((found.only_donors, "donors"), (found.only_target, "target")):
        if len(ids):
            yield warned(f"{len(ids):,} ids only the {side} have, the first is {ids[0]}")


def _unknown(why: str) -> Level:
    return Level("tokenizer", "not compared", (warned(f"tokens are not compared: {why}"),))


def _numbers(
    differing: int, only_donors: int, only_target: int, shared: int
) -> dict[str, float | int | None]:
    return {
        "shared_ids": shared,
        "differing_ids": differing,
        "ids_of_donors_only": only_donors,
        "ids_of_target_only": only_target,
    }


def _shown(text: str) -> str:
    return repr(text[:SHOWN_CHARACTERS]) + ("..." if len(text) > SHOWN_CHARACTERS else "")


def _digest(path: Path) -> str:
    return blake3.blake3(path.read_bytes()).hexdigest()


def _is_same_file(path: Path, digest: str) -> bool:
    try:
        return path.stat().st_size <= MAX_TOKENIZER_BYTES and _digest(path) == digest
    except OSError:
        return False


def _hashes(tokens: Mapping[int, str]) -> bytes:
    """Hash each token from id 0, and nothing where no token has the id."""
    hashes = bytearray(_hash("") * (max(tokens, default=-1) + 1))
    for token_id, text in tokens.items():
        hashes[token_id * HASH_BYTES : (token_id + 1) * HASH_BYTES] = _hash(text)
    return bytes(hashes)


def _hash(text: str) -> bytes:
    return blake3.blake3(text.encode("utf-8", "surrogatepass")).digest(length=HASH_BYTES)


_NO_TOKEN = np.frombuffer(_hash(""), dtype="<u2")[0]


def _padded(hashes: bytes, size: int = 0) -> npt.NDArray[np.uint16]:
    """Return one number for each token id, `_NO_TOKEN` up to `size` ids."""
    found = np.frombuffer(hashes, dtype="<u2")
    padded = np.full(max(size, len(found)), _NO_TOKEN)
    padded[: len(found)] = found
    return padded


def _vocabulary(vocab: Any) -> dict[int, str]:
    if isinstance(vocab, dict):  # BPE, WordPiece, WordLevel: token -> id
        return {token_id: token for token, token_id in vocab.items()}
    return {token_id: entry[0] for token_id, entry in enumerate(vocab)}  # Unigram: [token, score]
