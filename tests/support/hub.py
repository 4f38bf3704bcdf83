"""A stand-in for the Hugging Face Hub: as much of its HTTP API as the real client uses.

It keeps repositories in memory, stores shards by LFS as the Hub does, and serves them from another
origin (`localhost` instead of `127.0.0.1`), so that a client that sends its token there is caught.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub import constants

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import pytest

__all__ = ["TOKEN", "Commit", "Repository", "StandInHub", "run_hub", "use_hub"]

TOKEN = "hf_standInTokenThatNobodyMaySee"
"""The one token that the stand-in accepts."""

LFS_SUFFIXES = (".safetensors", ".bin", ".pt")


@dataclass(slots=True)
class Commit:
    """One state of a repository."""

    oid: str
    files: dict[str, bytes]
    message: str = ""


@dataclass(slots=True)
class Repository:
    """A repository of models: commits, and names for some of them."""

    commits: dict[str, Commit]
    refs: dict[str, str]
    is_private: bool = False
    is_gated: bool = False

    def at(self, revision: str) -> Commit | None:
        """Find a commit by branch, tag or hash."""
        return self.commits.get(self.refs.get(revision, revision))


@dataclass(slots=True)
class StandInHub:
    """What the server knows, what it was asked, and what it shall do wrong."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    """LFS objects by their sha256."""
    requests: list[tuple[str, str, bool]] = field(default_factory=list)
    """Method, path and whether it came with a token."""
    answers: dict[str, tuple[int, dict[str, Any]]] = field(default_factory=dict)
    """Status and body for each path that begins so, instead of the right answer."""
    dies_within: str = ""
    """A file in whose middle the server goes away."""
    stop: threading.Event = field(default_factory=threading.Event)

    def add(self, repo: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Commit files to a branch, beside those that it has; make what is missing.

        Returns:
            The commit.
        """
        repository = self.repositories.setdefault(repo, Repository({}, {}))
        before = repository.at(branch)
        return self.commit(repository, branch, {**(before.files if before else {}), **files}, "")

    def add_folder(self, repo: str, folder: Path, branch: str = "main") -> str:
        """Commit all files of a folder."""
        return self.add(repo, {p.name: p.read_bytes() for p in folder.iterdir()}, branch)

    def commit(
        self, repository: Repository, branch: str, files: dict[str, bytes], message: str
    ) -> str:
        """Make a commit of exactly these files."""
        text = f"{len(repository.commits)} {branch} {sorted(files)} {message}"
        oid = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        repository.commits[oid] = Commit(oid, files, message)
        repository.refs[branch] = oid
        for data in files.values():
            self.blobs[hashlib.sha256(data).hexdigest()] = data
        return oid

    def fetched(self) -> set[str]:
        """Name the repository's files whose content was asked for."""
        paths = [path for method, path, _ in self.requests if method == "GET"]
        return {unquote(p.rpartition("/")[2]) for p in paths if "/resolve/" in p or "/cdn/" in p}


class _Answered(Exception):  # noqa: N818 - no error: it ends a request's handling
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandInHub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if self.hub.stop.is_set():
            self.close_connection = True
            return
        self.path_only = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(
            (self.command, self.path_only, self.headers.get("Authorization") is not None)
        )
        try:
            for start, (status, body) in self.hub.answers.items():
                if self.path_only.startswith(start):
                    self._send_json(body, status)
            for pattern, method in ROUTES:
                if match := re.fullmatch(pattern, f"{self.command} {self.path_only}"):
                    getattr(self, method)(*match.groups())
            self._refuse(404, "EntryNotFound", f"no such route: {self.command} {self.path_only}")
        except _Answered:
            pass

    # What the routes do.

    def create(self) -> None:
        self._need_token()
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo}"}
        if repo in self.hub.repositories:
            self._send_json({**url, "error": "You already created this model repo"}, 409)
        made = Repository({}, {}, is_private=asked.get("visibility") == "private")
        self.hub.repositories[repo] = made
        self.hub.commit(made, "main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial")
        self._send_json(url)

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        front = content.split("---\n")[1] if content.startswith("---\n") else ""
        try:
            fields = yaml.safe_load(front)
        except yaml.YAMLError as exc:
            self._send_json({"errors": [{"message": str(exc)}]}, 400)
        is_sound = isinstance(fields, dict)
        self._send_json({"errors": [], "warnings": []} if is_sound else {"errors": []}, 200)

    def branch(self, repo: str, branch: str) -> None:
        self._need_token()
        repository = self._repository(repo)
        if branch in repository.refs:
            self._refuse(409, "", "the branch exists")
        repository.refs[branch] = repository.refs["main"]
        self._send_json({})

    def info(self, repo: str, revision: str = "main") -> None:
        repository, commit = self._commit(repo, revision)
        siblings = [{"rfilename": name} for name in sorted(commit.files)]
        found = {"id": repo, "sha": commit.oid, "private": repository.is_private}
        self._send_json({**found, "siblings": siblings})

    def tree(self, repo: str, revision: str) -> None:
        _, commit = self._commit(repo, revision)
        self._send_json([_entry(*item) for item in sorted(commit.files.items())])

    def preupload(self, repo: str, revision: str) -> None:
        self._need_token()
        _, commit = self._commit(repo, revision)
        files = []
        for asked in json.loads(self.body)["files"]:
            name = asked["path"]
            old = commit.files.get(name)
            oid = None if old is None else _oid(name, old)
            mode = "lfs" if name.endswith(LFS_SUFFIXES) else "regular"
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send_json({"files": files})

    def lfs_batch(self, repo: str) -> None:
        self._need_token()
        self._repository(repo)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid = asked["oid"]
            upload = {"href": f"{self.hub.endpoint.replace('127.0.0.1', 'localhost')}/cdn/{oid}"}
            verify = {"href": f"{self.hub.endpoint}/lfs-verify"}
            actions = {"upload": upload, "verify": verify}
            objects.append(asked if oid in self.hub.blobs else {**asked, "actions": actions})
        self._send_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._refuse(400, "", "other bytes than announced")
        self.hub.blobs[oid] = self.body
        self._send_json({})

    def lfs_verify(self) -> None:
        self._need_token()
        asked = json.loads(self.body)
        if len(self.hub.blobs.get(asked["oid"], b"")) != asked["size"]:
            self._refuse(404, "", "no such object")
        self._send_json({})

    def commit(self, repo: str, revision: str) -> None:
        self._need_token()
        repository, before = self._commit(repo, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", before.oid) != before.oid:
            self._refuse(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(before.files)
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.blobs[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
                case key:
                    self._refuse(400, "", f"no such operation: {key}")
        oid = self.hub.commit(repository, revision, files, header["summary"])
        url = f"{self.hub.endpoint}/{repo}/commit/{oid}"
        self._send_json({"success": True, "commitOid": oid, "commitUrl": url})

    def resolve(self, repo: str, revision: str, name: str) -> None:
        _, commit = self._commit(repo, revision)
        data = commit.files.get(name)
        if data is None:
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit.oid})
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{_oid(name, data)}"'}
        if not name.endswith(LFS_SUFFIXES):
            self._send(200, data, headers)
        oid = hashlib.sha256(data).hexdigest()
        self.hub.blobs.setdefault(oid, data)
        headers |= {
            "Location": f"{self.hub.endpoint.replace('127.0.0.1', 'localhost')}/cdn/{oid}/{name}",
            "X-Linked-ETag": f'"{oid}"',
            "X-Linked-Size": str(len(data)),
        }
        self._send(302, b"", headers)

    def cdn(self, oid: str, name: str) -> None:
        data = self.hub.blobs[oid]
        if name == self.hub.dies_within:
            self._die(data)
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(asked[1])
            ranged = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            self._send(206, data[start:], ranged)
        self._send(200, data, {"Accept-Ranges": "bytes"})

    # How it answers.

    def _need_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(401, "", f"Invalid credentials: {self.headers.get('Authorization')}")

    def _repository(self, repo: str) -> Repository:
        found = self.hub.repositories.get(repo)
        given = self.headers.get("Authorization")
        if given not in {None, f"Bearer {TOKEN}"}:
            # As a careless proxy would: with the token in the text.
            self._refuse(401, "", f"Invalid credentials in header: {given}")
        if found is None or (found.is_private and given is None):
            self._refuse(401 if given is None else 404, "RepoNotFound", "Repository not found")
        if found.is_gated:
            self._refuse(403, "GatedRepo", f"Access to model {repo} is restricted.")
        return found

    def _commit(self, repo: str, revision: str) -> tuple[Repository, Commit]:
        repository = self._repository(repo)
        commit = repository.at(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit

    def _refuse(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> NoReturn:
        named = {"X-Error-Message": message, **(headers or {})}
        named |= {"X-Error-Code": code} if code else {}
        self._send(status, json.dumps({"error": message}).encode(), named)

    def _send_json(self, body: object, status: int = 200) -> NoReturn:
        self._send(status, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> NoReturn:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        raise _Answered

    def _die(self, data: bytes) -> NoReturn:
        """Send half of a file, and be gone for everyone from then on."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        self.hub.stop.set()
        self.close_connection = True
        raise _Answered


REPO = r"([^/]+/[^/]+)"
ROUTES = (
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate_yaml"),
    (rf"POST /api/models/{REPO}/branch/(.+)", "branch"),
    (rf"GET /api/models/{REPO}", "info"),
    (rf"GET /api/models/{REPO}/revision/(.+)", "info"),
    (rf"GET /api/models/{REPO}/tree/(.+)", "tree"),
    (rf"POST /api/models/{REPO}/preupload/(.+)", "preupload"),
    (rf"POST /api/models/{REPO}/commit/(.+)", "commit"),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /cdn/([0-9a-f]{64})", "lfs_upload"),
    (r"POST /lfs-verify", "lfs_verify"),
    (r"GET /cdn/([0-9a-f]{64})/(.+)", "cdn"),
    (rf"(?:GET|HEAD) /{REPO}/resolve/([^/]+)/(.+)", "resolve"),
)


@contextmanager
def run_hub() -> Iterator[StandInHub]:
    """Serve a stand-in on a free port."""
    hub = StandInHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=_serve, args=(server, hub.stop))
    thread.start()
    try:
        yield hub
    finally:
        hub.stop.set()
        thread.join()


def use_hub(
    hub: StandInHub, cache: Path, monkeypatch: pytest.MonkeyPatch, token: str | None = None
) -> None:
    """Point the client at a stand-in: in this process, and by environment in its children.

    Args:
        hub: The stand-in.
        cache: What HF_HOME is.
        monkeypatch: Takes it back.
        token: What HF_TOKEN is.
    """
    # The client reads its environment once, when it is imported.
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_STORED_TOKENS_PATH": str(cache / "stored_tokens"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name, value in {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": token or "",
    }.items():
        monkeypatch.setenv(name, str(value))
    for name in ("HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)


def _serve(server: ThreadingHTTPServer, stop: threading.Event) -> None:
    server.timeout = 0.02
    with server:
        while not stop.is_set():
            server.handle_request()


def _oid(name: str, data: bytes) -> str:
    """Return a file's object id: sha256 of an LFS file, git's own of another."""
    if name.endswith(LFS_SUFFIXES):
        return hashlib.sha256(data).hexdigest()
    header = f"blob {len(data)}\0".encode()
    return hashlib.sha1(header + data, usedforsecurity=False).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data)}
    if name.endswith(LFS_SUFFIXES):
        pointer = {"oid": _oid(name, data), "size": len(data), "pointerSize": 134}
        return entry | {"oid": _oid("", data), "lfs": pointer}
    return entry | {"oid": _oid(name, data)}
