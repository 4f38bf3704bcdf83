"""Put a stored vector on the Hugging Face Hub, whole or not at all.

Fetching stands in `checkpoint.fetch`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_rvec.checkpoint.hub import HubId, explain, hub_errors, page_url, quiet_progress
from vllm_rvec.errors import ConfigError
from vllm_rvec.vector.card import make_card
from vllm_rvec.vector.manifest import MANIFEST_NAME, is_own
from vllm_rvec.vector.reader import VectorReader
from vllm_rvec.vector.verification import verify

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.hf_api import ModelInfo

    Operation = CommitOperationAdd | CommitOperationDelete

__all__ = ["Pushed", "open_whole", "push", "upload"]

CARD_NAME = "README.md"


@dataclass(frozen=True, slots=True)
class Pushed:
    """Where a vector is on the Hub."""

    repo: str
    """`owner/name`."""
    url: str
    """Its page."""
    commit: str
    """What it will always be found by: `owner/name@commit`."""


def push(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Check all of a vector's data, then put it on the Hub: `open_whole` and `upload`."""
    vector = open_whole(folder)
    return upload(vector, repo, private=private, revision=revision, message=message, token=token)


def open_whole(folder: Path, on_progress: Callable[[int, int], None] | None = None) -> VectorReader:
    """Open a vector and read all of its data: what is published was sound a moment before.

    Args:
        folder: The vector's folder.
        on_progress: As for `verify`.

    Raises:
        VectorNotFoundError: There is no such folder.
        VectorFormatError: It is no vector, or one that this version does not read.
        VectorCorruptError: It is not as it was written, or not fit to be added.
    """
    vector = VectorReader(folder)
    verify(vector, remembered=False, on_progress=on_progress)
    return vector


def upload(
    vector: VectorReader,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Put a vector into a repository of its own on the Hub, in one commit.

    Manifest, shards and model card appear together, and shards of an older vector in the same
    repository go with the same commit: no revision holds half a vector, or parts of two. The card
    is the folder's own README.md, or made from the manifest.

    Args:
        vector: The vector; `open_whole` opens and checks one.
        repo: `owner/name`; made if there is none.
        private: Whether the repository is to be private. One that exists is not changed: if it is
            public, the vector is not pushed.
        revision: The branch; made if there is none. The main branch if not given.
        message: The commit's.
        token: What to log in with, if not HF_TOKEN or what `hf auth login` stored.

    Raises:
        ConfigError: A wrong name, no access, no network, a repository that holds something else.
    """
    hub_id = _parse(repo, revision)
    card = _card(vector, hub_id.repo)
    from huggingface_hub import HfApi  # noqa: PLC0415 - half a second

    try:
        with quiet_progress():
            api = HfApi(token=_checked(token))
            info = _prepare(api, hub_id, private=private)
            return _commit(api, hub_id, info, _operations(vector, card, info), message)
    except ConfigError:
        raise
    except hub_errors() as exc:
        refusal = explain(exc, hub_id, token)
        raise ConfigError(
            f"the vector {vector.folder} can't be pushed to {hub_id}",
            why=refusal.why,
            fix=refusal.fix,
            path=vector.folder,
        ) from exc


def _parse(repo: str, revision: str | None) -> HubId:
    hub_id = HubId.parse(repo if revision is None else f"{repo}@{revision}")
    if hub_id is None or (revision is None and hub_id.revision is not None):
        raise ConfigError(
            f"a vector can't be pushed to {repo!r}, branch {revision or 'main'!r}",
            why="that is no name of a repository and a branch on the Hub",
            fix="give owner/name, and a branch, if any, as the revision",
        )
    return hub_id


def _checked(token: str | None) -> str | None:
    # The transport's own error would show it.
    if token is not None and not (token.isascii() and token.isprintable() and token):
        raise ConfigError("the token holds characters that no token has", fix="copy it again")
    return token


def _card(vector: VectorReader, repo: str) -> bytes:
    """Return the folder's own model card, or make one."""
    path = vector.folder / CARD_NAME
    if not path.exists():
        return make_card(vector.manifest, repo).encode()
    if not path.is_file() or not is_own(path, vector.folder):
        raise ConfigError(
            f"{path} is no file of the vector's own",
            why="it is a link to somewhere else, which would become public",
            fix="replace or remove it; without one, a model card is made from the manifest",
            path=path,
        )
    return path.read_bytes()


def _prepare(api: HfApi, hub_id: HubId, *, private: bool) -> ModelInfo:
    """Have a repository and branch that may take the vector; return what they hold now."""
    # None leaves it to the organisation's default.
    api.create_repo(hub_id.repo, private=private or None, exist_ok=True)
    if hub_id.revision is not None:
        api.create_branch(hub_id.repo, branch=hub_id.revision, exist_ok=True)
    info = api.model_info(hub_id.repo, revision=hub_id.revision)
    if private and not info.private:
        raise ConfigError(
            f"the repository {hub_id.repo} is public",
            why="it was there before, and a private one was asked for",
            fix="make it private in its settings on the Hub, or choose another name",
        )
    shards = sorted(_shards(info))
    if shards and MANIFEST_NAME not in _names(info):
        raise ConfigError(
            f"the repository {hub_id} holds something else than a vector",
            problems=shards,
            why="these files would be read as parts of the vector",
            fix="push the vector to a repository or branch of its own",
        )
    return info


def _names(info: ModelInfo) -> set[str]:
    return {sibling.rfilename for sibling in info.siblings or ()}


def _shards(info: ModelInfo) -> set[str]:
    return {name for name in _names(info) if name.endswith(".safetensors") and "/" not in name}


def _operations(vector: VectorReader, card: bytes, info: ModelInfo) -> list[Operation]:
    from huggingface_hub import (  # noqa: PLC0415 - half a second
        CommitOperationAdd,
        CommitOperationDelete,
    )

    files: dict[str, Path | bytes] = {path.name: path for path in vector.shards}
    files |= {CARD_NAME: card, MANIFEST_NAME: vector.folder / MANIFEST_NAME}
    added = [CommitOperationAdd(name, data) for name, data in files.items()]
    stale = sorted(_shards(info) - files.keys())
    return [*added, *(CommitOperationDelete(name, is_folder=False) for name in stale)]


def _commit(
    api: HfApi, hub_id: HubId, info: ModelInfo, operations: list[Operation], message: str | None
) -> Pushed:
    done = api.create_commit(
        hub_id.repo,
        operations,
        commit_message=message or "Add a reasoning vector",
        revision=hub_id.revision,
        # Refused if anyone else has pushed since: their shards and ours must not mix.
        parent_commit=info.sha,
    )
    return Pushed(hub_id.repo, page_url(hub_id), done.oid)
