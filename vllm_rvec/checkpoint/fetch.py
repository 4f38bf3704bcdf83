"""Find the folder that a user's word for a checkpoint or a vector stands for.

The word is a local folder, or a Hub id: then the folder is the one in the Hub's cache, filled
first if need be. Pickles are never fetched. Imports no torch. Vectors by URL are found by
`vector.fetching`, which asks here for all others.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vllm_rvec.checkpoint.hub import HubId, Refusal, explain, hub_errors, quiet_progress
from vllm_rvec.checkpoint.remote import is_url, shown
from vllm_rvec.checkpoint.table import is_folder, why_no_folder
from vllm_rvec.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    FetchError,
    RvecError,
    VectorFormatError,
    VectorNotFoundError,
    printable,
)

__all__ = ["CHECKPOINT", "VECTOR", "Located", "locate", "locate_adapter", "locate_checkpoint"]


@dataclass(frozen=True, slots=True)
class Located:
    """A folder on this machine, and what it is called elsewhere."""

    folder: Path
    id: str
    """A Hub id, a URL without what is secret in it, or the folder's own name."""
    revision: str | None = None
    """The commit on the Hub."""

    @classmethod
    def of(cls, found: Path | Located) -> Located:
        """Take a folder that may have been located already."""
        return found if isinstance(found, Located) else cls.local(found)

    @classmethod
    def local(cls, folder: Path) -> Located:
        """Name a folder that is nothing but local."""
        # Not every name is text: a manifest and a model card say this one.
        return cls(folder, printable(folder.resolve().name))


@dataclass(frozen=True, slots=True)
class _Kind:
    """What is looked for, and how its absence is said."""

    word: str
    first: str
    """The file without which a repository holds no such thing. Fetched before all others, so that
    an id of something else costs no download of its weights."""
    patterns: tuple[str, ...]
    unusable: type[RvecError]
    missing: type[RvecError]


CHECKPOINT: Final = _Kind(
    "checkpoint",
    "config.json",
    (
        "*.safetensors",
        "*.json",
        "*.jinja",
        "tokenizer.model",
        "*.txt",
        "README.md",
        "LICENSE*",
    ),
    CheckpointError,
    CheckpointNotFoundError,
)
VECTOR: Final = _Kind(
    "vector",
    "vector.json",
    ("vector.json", "*.safetensors", "README.md"),
    VectorFormatError,
    VectorNotFoundError,
)

ADAPTER: Final = _Kind(
    "adapter",
    "adapter_config.json",
    ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"),
    CheckpointError,
    CheckpointNotFoundError,
)

IGNORED_FILES = ["*/*", "consolidated*.safetensors"]
"""Not fetched: folders (other formats, other precisions), and Mistral's second copy of the
weights in one file."""


def locate_checkpoint(reference: str) -> Located:
    """Find a checkpoint's folder; fetch it from the Hub if it is not on this machine.

    Args:
        reference: A folder (`~` stands for home), or a Hub id: `owner/name` or
            `owner/name@revision`, with a branch, tag or commit. A folder goes before a Hub id of
            the same name. HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are honoured.

    Returns:
        The folder: as it was given, or in the Hub's cache.

    Raises:
        CheckpointNotFoundError: There is no such folder, repository or revision; or it is not in
            the cache, and HF_HUB_OFFLINE is set.
        CheckpointError: No access; or the repository holds no checkpoint in safetensors.
        FetchError: The network or the Hub fails.
    """
    located = locate(reference, CHECKPOINT)
    if located.revision is not None and not any(located.folder.glob("*.safetensors")):
        raise CheckpointError(
            f"the repository {reference} holds no safetensors file",
            why="pickle files can run code and are never fetched",
            fix="convert the checkpoint to safetensors first (transformers: save_pretrained)",
            path=located.folder,
        )
    return located


def locate_adapter(reference: str) -> Located:
    """Find a LoRA adapter's folder; fetch it from the Hub if it is not on this machine.

    Args:
        reference: As for `locate_checkpoint`.

    Returns:
        The folder: as it was given, or in the Hub's cache. Nothing is checked of what it holds.

    Raises:
        CheckpointNotFoundError: There is no such folder, repository or revision; or it is not in
            the cache, and HF_HUB_OFFLINE is set.
        CheckpointError: No access, or the repository holds no adapter.
        FetchError: The network or the Hub fails.
    """
    return locate(reference, ADAPTER)


def locate(reference: str, kind: _Kind) -> Located:
    """Find a folder of some kind, here or on the Hub.

    Args:
        reference: As for `locate_checkpoint`.
        kind: `CHECKPOINT`, `ADAPTER` or `VECTOR`.

    Returns:
        The folder. Nothing is checked of what it holds.

    Raises:
        RvecError: There is none (`kind.missing`), it is something else (`kind.unusable`), or it
            can't be fetched (`FetchError`).
    """
    # Not Path.expanduser: that raises where there is no such user.
    folder = Path(os.path.expanduser(reference))  # noqa: PTH111
    if reference and is_folder(folder):
        return Located.local(folder)
    hub_id = None if _exists(folder) else HubId.parse(reference)
    if hub_id is None:
        raise kind.missing(
            f"there is no {kind.word} folder {_shown(reference)}",
            why=_why_nothing(folder, reference),
            fix="give a folder, or an id on the Hub: owner/name or owner/name@revision",
            path=None if is_url(reference) else folder,  # it may hold a password
        )
    return _fetch(hub_id, kind)


def _exists(path: Path) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError:  # a NUL in it
        return False


def _shown(reference: str) -> str:
    return shown(reference) if reference and reference.isprintable() else repr(reference)


def _why_nothing(folder: Path, reference: str) -> str:
    if not reference:
        return "the name is empty"
    why = why_no_folder(folder)
    looks_local = reference.startswith(("/", ".", "~")) or reference.count("/") != 1
    return why if looks_local or _exists(folder) else f"{why}, and it is no id on the Hub either"


def _fetch(hub_id: HubId, kind: _Kind) -> Located:
    folder = _download(hub_id, hub_id.revision, kind, [kind.first])
    commit = folder.name
    if not (folder / kind.first).is_file():
        raise kind.unusable(
            f"the repository {hub_id} holds no {kind.word}",
            why=f"there is no {kind.first} in it",
            fix=f"check the id: a {kind.word} is expected here",
        )
    return Located(_download(hub_id, commit, kind, list(kind.patterns)), hub_id.repo, commit)


def _download(hub_id: HubId, revision: str | None, kind: _Kind, patterns: list[str]) -> Path:
    """Have the matching files in the cache, and return the folder of the commit."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - half a second

    try:
        with quiet_progress():
            found = snapshot_download(
                hub_id.repo,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=IGNORED_FILES,
            )
    except hub_errors() as exc:
        refusal = explain(exc, hub_id)
        raise _kind_of(refusal, kind)(
            f"there is no folder {hub_id} here, and the Hub gives no such {kind.word}",
            why=refusal.why,
            fix=refusal.fix,
        ) from exc
    return Path(found)


def _kind_of(refusal: Refusal, kind: _Kind) -> type[RvecError]:
    if refusal.is_missing:
        return kind.missing
    return FetchError if refusal.may_pass else kind.unusable
