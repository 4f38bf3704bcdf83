"""Hub ids, and the Hugging Face Hub's refusals in a user's words. Imports no torch.

What is fetched stands in `fetch`, what is pushed in `vector.hub`. huggingface_hub takes half a
second to import, so functions here do it when they are called.
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "HubId",
    "Refusal",
    "explain",
    "harmless",
    "hub_errors",
    "is_hub_name",
    "page_url",
    "quiet_progress",
]

NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
"""An owner's or a repository's name, as the Hub allows them."""

REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]*")
"""A branch, tag or commit. Narrower than git's rule: the client makes file names of it."""

SECRETS = re.compile(
    r"hf_[\w.-]+|(?i:bearer)\s+\S+|(?<=://)[^/@\s]+@|(?<=[^\s?])\?[^\s'\"]+=[^\s'\"]+"
)
"""Tokens, passwords in a URL, and a URL's query, which signs it."""

SECRET_VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
"""Variables of the environment whose values no text shows."""

SHOWN_CHARACTERS = 300
"""How much a message shows of what a server wrote."""

LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository of models on the Hub, at a revision."""

    repo: str
    """`owner/name`."""
    revision: str | None = None
    """A branch, tag or commit; None for the main branch."""

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    @classmethod
    def parse(cls, reference: str) -> HubId | None:
        """Read `owner/name` or `owner/name@revision`; None where a text is neither.

        >>> HubId.parse("Qwen/Qwen2.5-1.5B@main")
        HubId(repo='Qwen/Qwen2.5-1.5B', revision='main')
        >>> HubId.parse("./Qwen2.5-1.5B"), HubId.parse("a/b/c"), HubId.parse("a/b@")
        (None, None, None)
        """
        repo, at, revision = reference.partition("@")
        if not is_hub_name(repo) or (at and not _is_revision(revision)):
            return None
        return cls(repo, revision if at else None)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the Hub did not give or take something."""

    why: str
    fix: str
    is_missing: bool = False
    """There is no such thing, as far as can be told from here."""
    may_pass: bool = False
    """The network's fault, or the Hub's: another time it may be given."""


def is_hub_name(text: str) -> bool:
    """Tell whether a text can be a repository's `owner/name`."""
    names = text.split("/")
    return (
        len(names) == 2
        and all(NAME.fullmatch(name) for name in names)
        and not any(pattern in text for pattern in ("--", ".."))
        and not text.endswith(".git")
    )


def page_url(hub_id: HubId) -> str:
    """Return the address of a repository's page, without a password of the endpoint's."""
    from huggingface_hub import constants  # noqa: PLC0415 - half a second

    endpoint = urlsplit(constants.ENDPOINT)
    host = endpoint.netloc.rpartition("@")[2]
    branch = "" if hub_id.revision is None else f"/tree/{hub_id.revision}"
    return f"{endpoint.scheme}://{host}{endpoint.path}/{hub_id.repo}{branch}"


def hub_errors() -> tuple[type[Exception], ...]:
    """Return what the client raises where the Hub, the network or the cache fails it.

    Beside its own errors these are the transport's, the disk's, and what comes of an answer that
    is not the Hub's: a proxy's page, a mirror's.
    """
    from huggingface_hub import errors  # noqa: PLC0415 - half a second

    # The transport is httpx or httpx2, by the client's version: take its root from the client.
    transport = errors.HfHubHTTPError.__bases__[0]
    return (transport, OSError, ValueError, RuntimeError, TypeError, KeyError, AssertionError)


def explain(exc: BaseException, hub_id: HubId, token: str | None = None) -> Refusal:
    """Say what one of `hub_errors` means.

    Args:
        exc: What the client raised.
        hub_id: What was asked for.
        token: A token that was given beside those of the environment; no text shows any.
    """
    from huggingface_hub import constants, errors  # noqa: PLC0415 - half a second

    is_wrapper = isinstance(exc, errors.LocalEntryNotFoundError | RuntimeError)
    if is_wrapper and exc.__cause__ is not None:
        return explain(exc.__cause__, hub_id, token)
    if isinstance(exc, errors.OfflineModeIsEnabled):
        return Refusal(
            "HF_HUB_OFFLINE is set, and it is not, or not whole, in the cache "
            f"{constants.HF_HUB_CACHE}",
            "unset HF_HUB_OFFLINE, or give a local folder",
            is_missing=True,
        )
    if isinstance(exc, errors.HfHubHTTPError):
        return _explain_answer(exc, hub_id, token)
    what = harmless(f"{type(exc).__name__}: {exc}", token)
    if isinstance(exc, hub_errors()[0]):
        return Refusal(
            f"the Hub at {harmless(constants.ENDPOINT)} can't be reached, or broke off: {what}",
            "check the network, the proxy and HF_ENDPOINT, then run it again",
            may_pass=True,
        )
    return Refusal(what, "check HF_ENDPOINT, and the disk that HF_HOME is on")


def _explain_answer(exc: Exception, hub_id: HubId, token: str | None) -> Refusal:
    """Say what an HTTP status of the Hub means."""
    from huggingface_hub import errors  # noqa: PLC0415 - half a second

    match exc:
        case errors.GatedRepoError():
            return Refusal(
                "the repository is gated, and this account has no access to it",
                f"ask for access on its page, and {LOG_IN}",
            )
        case errors.RevisionNotFoundError():
            return Refusal(
                f"{hub_id.repo} has no branch, tag or commit {hub_id.revision or 'main'}",
                "look at the repository's branches and tags on the Hub",
                is_missing=True,
            )
        case errors.RepositoryNotFoundError():
            return Refusal(
                "the Hub knows no such repository, or this account may not see it",
                f"check the id; for a private repository {LOG_IN}",
                is_missing=True,
            )
        case errors.HfHubHTTPError():
            said = exc.server_message or ""
            return _explain_status(exc.response.status_code, harmless(said, token))
    raise exc


def _explain_status(status: int, said: str) -> Refusal:
    words = {
        401: ("the Hub did not accept the token, or got none (401)", LOG_IN),
        403: ("the token has no right to do this (403)", f"{LOG_IN}, with a token that may"),
        412: ("the repository was changed meanwhile (412)", "run it again"),
        429: ("the Hub gets too many requests from here (429)", "wait some minutes, or log in"),
    }
    why, fix = words.get(status, (f"the Hub answered {status}", "try again later"))
    may_pass = status == 429 or status >= 500
    return Refusal(f"{why}: {said}" if said else why, fix, may_pass=may_pass)


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Keep the client's progress bars off stderr where that is no terminal."""
    from huggingface_hub import constants  # noqa: PLC0415 - half a second
    from huggingface_hub.utils.tqdm import (  # noqa: PLC0415 - half a second
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    # A value in the environment, either way, is the user's word.
    is_decided = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None
    if is_terminal or is_decided or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _is_revision(text: str) -> bool:
    return bool(REVISION.fullmatch(text)) and ".." not in text


def harmless(text: str, *secrets: str | None) -> str:
    """Take secrets and a terminal's control characters out of what another machine wrote.

    Args:
        text: What it wrote.
        secrets: What it must not show, beside those of the environment and of known forms.
    """
    for secret in (*secrets, *map(os.environ.get, SECRET_VARIABLES)):
        text = text.replace(secret, "***") if secret else text
    text = "".join(c if c.isprintable() else " " for c in SECRETS.sub("***", text))
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
