"""vllm_rvec.vector.hub: a vector gets to the Hub whole, in one commit, or not at all."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch

from tests.support.checkpoints import tensors
from tests.support.hub import TOKEN, StandInHub, run_hub, use_hub
from vllm_rvec.errors import ConfigError, VectorCorruptError, VectorFormatError
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.fetching import locate_vector
from vllm_rvec.vector.hub import push

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REPO = "owner/vector"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """An empty stand-in, and a user who is logged in."""
    with run_hub() as found:
        use_hub(found, tmp_path / "hf", monkeypatch, TOKEN)
        yield found


@pytest.fixture
def copy(vector: Path, tmp_path: Path) -> Path:
    """A vector of one's own to change."""
    return shutil.copytree(vector, tmp_path / "copy")


def commits(hub: StandInHub, repo: str = REPO) -> list[set[str]]:
    """The files of each commit, first to last."""
    return [set(commit.files) for commit in hub.repositories[repo].commits.values()]


def test_what_is_pushed_is_what_is_fetched(hub: StandInHub, vector: Path) -> None:
    """Byte for byte, and tensor for tensor."""
    done = push(vector, REPO)
    located = locate_vector(REPO)
    assert (located.id, located.revision) == (REPO, done.commit)
    assert done.url == f"{hub.endpoint}/{REPO}"
    for name in ("vector.json", "vector.safetensors"):
        assert (located.folder / name).read_bytes() == (vector / name).read_bytes()
    reader = VectorReader(located.folder)
    for name, tensor in tensors(vector).items():
        found = reader.tensor(name)
        assert found is not None
        assert torch.equal(found, tensor)


def test_all_files_come_with_one_commit(hub: StandInHub, vector: Path) -> None:
    """Nobody sees half a vector."""
    push(vector, REPO)
    own = {".gitattributes"}
    assert commits(hub) == [own, own | {"README.md", "vector.json", "vector.safetensors"}]


def test_the_card_is_made_from_the_manifest(hub: StandInHub, vector: Path) -> None:
    """The Hub takes its front matter, and it names the repository."""
    done = push(vector, REPO)
    card = hub.repositories[REPO].commits[done.commit].files["README.md"].decode()
    assert f"--vector {REPO}\n" in card
    assert ("POST", "/api/validate-yaml", True) in hub.requests


def test_a_card_of_ones_own_is_kept(hub: StandInHub, copy: Path) -> None:
    """It says more than a manifest can."""
    (copy / "README.md").write_text("---\nlicense: mit\n---\n# mine\n")
    done = push(copy, REPO)
    files = hub.repositories[REPO].commits[done.commit].files
    assert files["README.md"] == (copy / "README.md").read_bytes()


def test_a_card_that_links_out_of_the_folder_is_not_published(
    hub: StandInHub, copy: Path, tmp_path: Path
) -> None:
    """A folder from elsewhere must not make a private file public."""
    (tmp_path / "id_ed25519").write_text("secret")
    (copy / "README.md").symlink_to(tmp_path / "id_ed25519")
    with pytest.raises(ConfigError, match="a link to somewhere else"):
        push(copy, REPO)
    assert not hub.requests


def test_a_fetched_vector_can_be_pushed_again(hub: StandInHub, vector: Path) -> None:
    """From the Hub's cache, where all files are links, to another name."""
    push(vector, REPO)
    push(locate_vector(REPO).folder, "owner/mirror")
    assert (
        hub.repositories["owner/mirror"].refs["main"] in locate_vector("owner/mirror").folder.name
    )


def test_a_branch_is_made_and_the_main_branch_is_not_touched(hub: StandInHub, vector: Path) -> None:
    """With a message of the user's."""
    done = push(vector, REPO, revision="v2", message="second try")
    repository = hub.repositories[REPO]
    assert repository.commits[done.commit].message == "second try"
    assert set(repository.commits[repository.refs["main"]].files) == {".gitattributes"}
    assert locate_vector(f"{REPO}@v2").revision == done.commit
    assert done.url.endswith("/tree/v2")
    push(vector, REPO, revision="v2")  # it exists now


def test_pushing_the_same_again_changes_nothing(hub: StandInHub, vector: Path) -> None:
    """No empty commit."""
    first = push(vector, REPO)
    assert push(vector, REPO).commit == first.commit
    assert len(commits(hub)) == 2


def test_shards_of_an_older_vector_go_with_the_same_commit(hub: StandInHub, vector: Path) -> None:
    """Left there, they would make the new one unreadable; the old commit still has them."""
    hub.add(REPO, {"vector.json": b"{}", "vector-00001-of-00002.safetensors": b"x", "a.png": b"y"})
    push(vector, REPO)
    located = locate_vector(REPO)
    assert VectorReader(located.folder).manifest.tensors
    assert commits(hub)[-1] == {"vector.json", "vector.safetensors", "README.md", "a.png"}


def test_a_models_repository_is_left_alone(hub: StandInHub, vector: Path) -> None:
    """A wrong name must not put a vector beside a model's shards, nor remove them."""
    hub.add(REPO, {"config.json": b"{}", "model.safetensors": b"x"})
    with pytest.raises(ConfigError, match=r"something else[\s\S]*model\.safetensors"):
        push(vector, REPO)
    assert len(commits(hub)) == 1


def test_a_private_repository_is_private(hub: StandInHub, vector: Path) -> None:
    """From its first moment."""
    push(vector, REPO, private=True)
    assert hub.repositories[REPO].is_private


def test_private_does_not_mean_a_public_one_that_exists(hub: StandInHub, vector: Path) -> None:
    """Nothing is uploaded to it."""
    hub.add(REPO, {"a.txt": b""})
    with pytest.raises(ConfigError, match=r"is public"):
        push(vector, REPO, private=True)
    assert not [path for method, path, _ in hub.requests if method == "PUT"]


def test_a_push_that_another_one_overtakes_is_refused(hub: StandInHub, vector: Path) -> None:
    """Shards of both would mix."""
    hub.answers[f"/api/models/{REPO}/commit"] = 412, {"error": "A commit has happened since."}
    with pytest.raises(ConfigError, match="was changed meanwhile") as caught:
        push(vector, REPO)
    assert caught.value.fix == "run it again"


@pytest.mark.parametrize("kind", ["bytes", "size", "manifest"])
def test_a_damaged_vector_is_not_pushed(hub: StandInHub, copy: Path, kind: str) -> None:
    """A byte that changed, a file cut off, a manifest that is none: the Hub is not even asked."""
    shard = copy / "vector.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    if kind == "bytes":
        shard.write_bytes(data)
    elif kind == "size":
        shard.write_bytes(data[:-1])
    else:
        (copy / "vector.json").write_text("{}")
    with pytest.raises((VectorCorruptError, VectorFormatError), match="vector"):
        push(copy, REPO)
    assert not hub.requests


@pytest.mark.parametrize(
    ("repo", "revision"),
    [("vector", None), ("a/b/c", None), ("a/b", "../x"), ("a/b@main", None), ("a/b", "")],
)
def test_names_that_the_hub_does_not_know(
    hub: StandInHub, vector: Path, repo: str, revision: str | None
) -> None:
    """Said before anything is sent."""
    with pytest.raises(ConfigError, match="owner/name"):
        push(vector, repo, revision=revision)
    assert not hub.requests


@pytest.mark.parametrize(
    "token", ["hf_wrongButWellFormed", "wrong-and-of-no-form", "", "a\nb", "ä"]
)
def test_a_wrong_token_is_refused_and_not_shown(hub: StandInHub, vector: Path, token: str) -> None:
    """Not even where the server's answer has it."""
    with pytest.raises(ConfigError, match="token") as caught:
        push(vector, REPO, token=token)
    if token:
        assert token not in str(caught.value)
        assert token not in repr(caught.getrepr(chain=False).reprcrash)
    assert not hub.repositories


def test_without_a_token_the_message_says_how_to_log_in(
    hub: StandInHub, vector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one thing that is missing."""
    use_hub(hub, tmp_path / "hf", monkeypatch)
    with pytest.raises(ConfigError, match="hf auth login"):
        push(vector, REPO)


def test_a_token_without_rights(hub: StandInHub, vector: Path) -> None:
    """As for a repository of someone else's."""
    hub.add(REPO, {})
    hub.answers["/api/models/owner/vector/preupload"] = 403, {"error": "Forbidden: pass a token"}
    with pytest.raises(ConfigError, match="no right to do this"):
        push(vector, REPO)


def test_an_upload_that_fails_leaves_nothing_to_see(hub: StandInHub, vector: Path) -> None:
    """Refused in the middle: the repository is as it was."""
    hub.answers["/cdn/"] = 400, {"error": "no"}
    with pytest.raises(ConfigError, match="the Hub answered 400"):
        push(vector, REPO)
    assert commits(hub) == [{".gitattributes"}]


def test_offline_is_said(hub: StandInHub, vector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variable's name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        push(vector, REPO)


def test_a_card_that_the_hub_refuses(hub: StandInHub, copy: Path) -> None:
    """The user's own, with broken front matter: said before any upload."""
    (copy / "README.md").write_text("---\n: [\n---\n")
    with pytest.raises(ConfigError, match=r"README\.md"):
        push(copy, REPO)
    assert not [path for method, path, _ in hub.requests if method == "PUT"]


def test_the_manifest_is_not_rewritten(hub: StandInHub, vector: Path) -> None:
    """Its digest is what later lineage refers to."""
    before = (vector / "vector.json").read_bytes()
    done = push(vector, REPO)
    pushed = hub.repositories[REPO].commits[done.commit].files["vector.json"]
    assert pushed == before == (vector / "vector.json").read_bytes()
    assert json.loads(pushed)["format"] == "rvec"
