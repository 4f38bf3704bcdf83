"""vllm_rvec.checkpoint.fetch and hub: a folder, what the Hub gives, or an error with the reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from huggingface_hub import close_session, constants
from huggingface_hub.utils.tqdm import are_progress_bars_disabled

from tests.support.checkpoints import tensors
from tests.support.hub import TOKEN, StandInHub, run_hub, use_hub
from vllm_rvec.checkpoint.fetch import locate_checkpoint
from vllm_rvec.checkpoint.hub import HubId
from vllm_rvec.checkpoint.reader import CheckpointReader
from vllm_rvec.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    FetchError,
    RvecError,
    VectorCorruptError,
    VectorFormatError,
    VectorNotFoundError,
)
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.fetching import locate_vector
from vllm_rvec.vector.hub import open_whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.checkpoints import Family

MODEL, VECTOR = "owner/model", "owner/vector"
PICKLES = {"pytorch_model.bin": b"\x80\x04cos\nsystem\n", "optimizer.pt": b"\x80\x04."}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """An empty stand-in that the client of this process talks to, with an empty cache."""
    with run_hub() as found:
        use_hub(found, tmp_path / "hf", monkeypatch)
        yield found


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the pauses out of the client's retries."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_folder_is_taken_as_it_is(family: Family, vector: Path) -> None:
    """Nothing is read of it."""
    located = locate_checkpoint(str(family.tuned))
    assert (located.folder, located.id, located.revision) == (family.tuned, "tuned", None)
    assert locate_vector(str(vector)).folder == vector


def test_a_tilde_is_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no shell has expanded it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert locate_checkpoint("~/model").folder == tmp_path / "model"


def test_a_folder_goes_before_a_hub_id_of_its_name(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub is not asked."""
    hub.add(MODEL, {"config.json": b"{}"})
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate_checkpoint(MODEL).revision is None
    assert not hub.requests


@pytest.mark.parametrize(
    "reference",
    [
        *("", "nowhere", "/no/where", "./no/where", "~no-such-user/x", "a/b/c", "a\0b/c", "a/b c"),
        *("a/b@", "a/b@-x", "a/b@../../x", "a/b@main\n", "-a/b", "a/.b", "a/b--c", "a/b.git"),
    ],
)
def test_what_is_neither_folder_nor_id_is_not_found(hub: StandInHub, reference: str) -> None:
    """The Hub is not asked, and the message says what to give."""
    for locate, kind in (
        (locate_checkpoint, CheckpointNotFoundError),
        (locate_vector, VectorNotFoundError),
    ):
        with pytest.raises(kind, match="owner/name@revision") as caught:
            locate(reference)
        assert isinstance(caught.value, FileNotFoundError)
    assert not hub.requests


def test_a_checkpoint_by_url_is_not_found(hub: StandInHub) -> None:
    """Only vectors are fetched so; and the message does not repeat a password."""
    with pytest.raises(CheckpointNotFoundError, match="owner/name@revision") as caught:
        locate_checkpoint("https://me:sesame@host/a?sig=open")
    assert "https://host/a" in str(caught.value)
    assert "sesame" not in str(caught.value) + repr(caught.value.path)
    assert "sig" not in str(caught.value)
    assert not hub.requests


def test_a_file_is_no_hub_id(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if its path looks like one."""
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "vector.pt").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VectorNotFoundError, match="it is a file"):
        locate_vector("owner/vector.pt")
    assert not hub.requests


def test_a_revision_may_be_a_branch_with_slashes() -> None:
    """`refs/pr/1`, as the Hub names a pull request."""
    assert HubId.parse("a/b@refs/pr/1") == HubId("a/b", "refs/pr/1")


@pytest.mark.parametrize("revision", ["branch", "commit", "none"])
def test_a_checkpoint_is_fetched_by_id_and_revision(
    hub: StandInHub, family: Family, revision: str
) -> None:
    """Its tensors are those of the revision asked for, and the commit is reported."""
    main = hub.add_folder(MODEL, family.base)
    old = hub.add_folder(MODEL, family.tuned, branch="old")
    reference = {"branch": f"{MODEL}@old", "commit": f"{MODEL}@{old}", "none": MODEL}[revision]
    located = locate_checkpoint(reference)
    expected, folder = (main, family.base) if revision == "none" else (old, family.tuned)
    assert (located.id, located.revision) == (MODEL, expected)
    reader = CheckpointReader(located.folder)
    for name, tensor in tensors(folder).items():
        assert torch.equal(reader.tensor(name), tensor)


def test_a_vector_is_read_in_place_from_the_cache(hub: StandInHub, vector: Path) -> None:
    """The cache's links into its own blobs are the one kind that the reader follows."""
    commit = hub.add_folder(VECTOR, vector)
    located = locate_vector(VECTOR)
    assert located.revision == commit
    assert (located.folder / "vector.safetensors").is_symlink()
    reader = VectorReader(located.folder)
    for name, tensor in tensors(vector).items():
        found = reader.tensor(name)
        assert found is not None
        assert torch.equal(found, tensor)


def test_a_vector_is_read_from_the_caches_shared_store(hub: StandInHub, vector: Path) -> None:
    """Of files that came by Xet the client keeps one copy for all repositories."""
    hub.add_folder(VECTOR, vector)
    located = locate_vector(VECTOR)
    # As huggingface_hub.utils._shared_blobs lays it out.
    blob = (located.folder / "vector.safetensors").resolve()
    store = Path(constants.HF_HUB_CACHE) / "blobs" / "ab"
    store.mkdir(parents=True)
    shared = blob.rename(store / f"ab{'0' * 62}")
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    assert VectorReader(located.folder).manifest.tensors
    elsewhere = shared.rename(store.parent.parent / "elsewhere")
    blob.unlink()
    blob.symlink_to(elsewhere)
    with pytest.raises(VectorCorruptError, match="a link out of the folder"):
        VectorReader(located.folder)


def test_pickles_and_other_formats_are_never_fetched(hub: StandInHub, family: Family) -> None:
    """Neither from the root nor from folders; nor the second copy that Mistral's models have."""
    others = {"onnx/model.safetensors": b"x", "consolidated.safetensors": b"x", "a.gguf": b"x"}
    hub.add(MODEL, PICKLES | others)
    hub.add_folder(MODEL, family.base)
    hub.add(VECTOR, {**PICKLES, "vector.json": b"{}"})
    locate_checkpoint(MODEL)
    locate_vector(VECTOR)
    known = {path.name for path in family.base.iterdir()}
    assert hub.fetched() <= known | {"vector.json"}


def test_a_repository_of_pickles_is_refused(hub: StandInHub) -> None:
    """And the reason is given."""
    hub.add(MODEL, {**PICKLES, "config.json": b"{}"})
    with pytest.raises(CheckpointError, match=r"no safetensors file[\s\S]*never fetched"):
        locate_checkpoint(MODEL)


def test_a_model_given_as_a_vector_costs_no_download(hub: StandInHub, family: Family) -> None:
    """Nor does a vector given as a model."""
    hub.add_folder(MODEL, family.base)
    with pytest.raises(VectorFormatError, match=r"there is no vector\.json in it"):
        locate_vector(MODEL)
    hub.add(VECTOR, {"vector.json": b"{}", "vector.safetensors": b"x"})
    with pytest.raises(CheckpointError, match=r"there is no config\.json in it"):
        locate_checkpoint(VECTOR)
    assert not hub.fetched()


def test_the_second_fetch_needs_no_network(
    hub: StandInHub, vector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was fetched once is there with HF_HUB_OFFLINE=1, and when the Hub is gone."""
    hub.add_folder(VECTOR, vector)
    first = locate_vector(f"{VECTOR}@main")
    asked = len(hub.requests)
    offline(monkeypatch)
    assert locate_vector(VECTOR) == first
    assert len(hub.requests) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.stop.set()
    close_session()
    assert locate_vector(VECTOR) == first


def test_a_known_commit_is_not_fetched_again(hub: StandInHub, vector: Path) -> None:
    """Given by its hash it can't have changed: no request at all."""
    commit = hub.add_folder(VECTOR, vector)
    first = locate_vector(VECTOR)
    asked = len(hub.requests)
    assert locate_vector(f"{VECTOR}@{commit}") == first
    assert len(hub.requests) == asked


def test_the_clients_bars_are_left_as_they_were(hub: StandInHub, vector: Path) -> None:
    """They are off for this package's own downloads only."""
    hub.add_folder(VECTOR, vector)
    locate_vector(VECTOR)
    assert not are_progress_bars_disabled()


def test_offline_and_not_in_the_cache(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the variable."""
    hub.add(MODEL, {"config.json": b"{}"})
    offline(monkeypatch)
    with pytest.raises(CheckpointNotFoundError, match="HF_HUB_OFFLINE is set"):
        locate_checkpoint(MODEL)
    assert not hub.requests


@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_missing_repository(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    """It may also be a private one: the Hub does not tell which."""
    use_hub(hub, tmp_path / "hf", monkeypatch, token)
    with pytest.raises(CheckpointNotFoundError, match="owner/none") as caught:
        locate_checkpoint("owner/none")
    assert "log in" in caught.value.fix
    with pytest.raises(VectorNotFoundError):
        locate_vector("owner/none")


def test_a_wrong_revision(hub: StandInHub, vector: Path) -> None:
    """The repository is there."""
    hub.add_folder(VECTOR, vector)
    with pytest.raises(VectorNotFoundError, match="no branch, tag or commit v2"):
        locate_vector(f"{VECTOR}@v2")


def test_a_gated_repository(hub: StandInHub) -> None:
    """It is there, so it is not 'not found'."""
    hub.add(MODEL, {"config.json": b"{}"})
    hub.repositories[MODEL].is_gated = True
    with pytest.raises(CheckpointError, match="gated") as caught:
        locate_checkpoint(MODEL)
    assert not isinstance(caught.value, CheckpointNotFoundError)


def test_a_token_that_is_refused_is_not_shown(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where a server writes it into its answer."""
    secret = "another-secret, of no known form"
    use_hub(hub, tmp_path / "hf", monkeypatch, secret)
    hub.add(MODEL, {"config.json": b"{}"})
    with pytest.raises(CheckpointError, match="401") as caught:
        locate_checkpoint(MODEL)
    assert secret not in str(caught.value)
    assert "another-secret" not in str(caught.value)


def test_a_token_is_sent_to_the_hub_only(
    hub: StandInHub, vector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards come from another origin, by signed addresses."""
    use_hub(hub, tmp_path / "hf", monkeypatch, TOKEN)
    hub.add_folder(VECTOR, vector)
    hub.repositories[VECTOR].is_private = True
    locate_vector(VECTOR)
    with_token = {path for _, path, has_token in hub.requests if has_token}
    assert with_token
    assert not any("/cdn/" in path for path in with_token)
    assert "vector.safetensors" in hub.fetched()


@pytest.mark.usefixtures("at_once")
def test_a_server_that_dies_half_way(hub: StandInHub, vector: Path) -> None:
    """Nothing that looks whole is left, online or offline, and the message says what happened."""
    hub.add_folder(VECTOR, vector)
    hub.dies_within = "vector.safetensors"
    for _ in range(2):
        with pytest.raises(FetchError, match="can't be reached, or broke off") as caught:
            locate_vector(VECTOR)
        assert "HF_ENDPOINT" in caught.value.fix
    (snapshot,) = Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*")
    assert not (snapshot / "vector.safetensors").exists()


def test_a_hub_that_is_not_there(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens; and a password in its address is not repeated."""
    hub.stop.set()
    address = hub.endpoint.replace("//", "//me:sesame@")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    with pytest.raises(FetchError, match="can't be reached") as caught:
        locate_checkpoint(MODEL)
    assert "sesame" not in str(caught.value)


def test_a_cache_that_can_not_be_written(hub: StandInHub, vector: Path, tmp_path: Path) -> None:
    """HF_HOME is a file, say: the message has the system's words."""
    hub.add_folder(VECTOR, vector)
    (tmp_path / "hf").write_bytes(b"")
    with pytest.raises(VectorFormatError, match="NotADirectoryError") as caught:
        locate_vector(VECTOR)
    assert "HF_HOME" in caught.value.fix


@pytest.mark.parametrize(
    ("status", "body", "kind", "why"),
    [
        (503, {"error": "\x1b[31mhf_abcdefgh down?a=b"}, FetchError, "the Hub answered 503"),
        (429, {}, FetchError, "too many requests"),
        (403, {"error": "no"}, CheckpointError, "no right to do this"),
        (200, {"some": "page"}, CheckpointError, "KeyError"),
    ],
)
def test_answers_that_are_not_the_hubs(
    hub: StandInHub, status: int, body: dict[str, str], kind: type[RvecError], why: str
) -> None:
    """One error of ours for each, and nothing of a server's that a terminal would obey."""
    hub.answers["/api/models"] = status, body
    with pytest.raises(kind, match=why) as caught:
        locate_checkpoint(MODEL)
    assert "\x1b" not in str(caught.value)
    assert "hf_abcdefgh" not in str(caught.value)


def test_a_shard_that_was_corrupted_on_the_hub_is_found_by_its_digest(
    hub: StandInHub, vector: Path
) -> None:
    """Of the right size: only reading it all tells, which `push` and `verify` do."""
    data = bytearray((vector / "vector.safetensors").read_bytes())
    data[-1] ^= 1
    hub.add_folder(VECTOR, vector)
    hub.add(VECTOR, {"vector.safetensors": bytes(data)})
    with pytest.raises(VectorCorruptError, match=r"vector\.safetensors"):
        open_whole(locate_vector(VECTOR).folder)


def test_neither_bars_nor_torch(hub: StandInHub, vector: Path) -> None:
    """In a child, by environment alone: stderr is a pipe and stays empty, torch is not imported."""
    hub.add_folder(VECTOR, vector)
    code = (
        "import sys; from vllm_rvec.vector.fetching import locate_vector\n"
        "print(locate_vector(sys.argv[1]).folder, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, VECTOR], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    folder, has_torch = done.stdout.split()
    assert (Path(folder) / "vector.safetensors").is_file()
    assert has_torch == "False"
