"""vllm_rvec.checkpoint.remote: what a URL names, and what of it is shown."""

from __future__ import annotations

import pytest

from vllm_rvec.checkpoint.remote import RemoteFolder, is_url, shown
from vllm_rvec.errors import ConfigError

FIRST = "vector.json"
PIN = "0123456789abcdef" * 4


def file_of(reference: str, name: str = FIRST) -> str:
    return RemoteFolder.parse(reference, FIRST).file(name)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("https://host/a/b", "https://host/a/b/vector.json"),
        ("https://host/a/b/", "https://host/a/b/vector.json"),
        ("https://host/a/b/vector.json", "https://host/a/b/vector.json"),
        ("https://host", "https://host/vector.json"),
        ("https://host/vector.json", "https://host/vector.json"),
        ("https://me:pw@host:8443/a", "https://me:pw@host:8443/a/vector.json"),
        ("https://host/a?sig=x%2Fy&v=1", "https://host/a/vector.json?sig=x%2Fy&v=1"),
        ("https://host/a%20b/\u00e9", "https://host/a%20b/%C3%A9/vector.json"),
        ("HTTPS://host/a", "https://host/a/vector.json"),
        ("http://127.0.0.1:80/a", "http://127.0.0.1:80/a/vector.json"),
        ("http://[::1]/a", "http://[::1]/a/vector.json"),
        ("http://localhost/a", "http://localhost/a/vector.json"),
        (f"http://host/a#blake3={PIN}", "http://host/a/vector.json"),
        ("s3://bucket", "s3://bucket/vector.json"),
        ("s3://bucket/a/", "s3://bucket/a/vector.json"),
        ("s3://bucket/a/vector.json", "s3://bucket/a/vector.json"),
        ("gs://bucket/a?b", "gs://bucket/a?b/vector.json"),
        (f"s3://bucket/a#blake3={PIN}", "s3://bucket/a/vector.json"),
    ],
)
def test_a_url_names_a_folder_of_files(reference: str, expected: str) -> None:
    """With or without a slash, or by the manifest itself; what signs it goes with each file."""
    assert file_of(reference) == expected


def test_a_files_name_is_quoted() -> None:
    """It is a name, not a piece of a URL."""
    assert file_of("https://host/a?s=1", "b#c?d e.safetensors") == (
        "https://host/a/b%23c%3Fd%20e.safetensors?s=1"
    )


def test_a_pin_is_read() -> None:
    """64 hexadecimal digits after the URL."""
    assert RemoteFolder.parse(f"s3://b/v#blake3={PIN}", FIRST).pin == PIN
    assert RemoteFolder.parse("s3://b/v", FIRST).pin is None


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        ("ftp://host/a", "ftp:// is not read here"),
        ("file:///etc", "file:// is not read here"),
        ("https://", "it names no host"),
        ("https:///a", "it names no host"),
        ("https://host:port/a", "it names no host|[Pp]ort"),
        ("https://[::1/a", "Invalid IPv6 URL"),
        ("https://host/a#b", "no pin"),
        ("https://host/a#blake3=12", "64 hexadecimal digits"),
        (f"https://host/a#blake3={PIN.upper()}", "64 hexadecimal digits"),
        ("https://host/a b", "holds spaces"),
        ("https://host/a\nb", "not printable"),
        ("s3://", "it names no bucket"),
        ("s3:///", "it names no bucket"),
        ("http://host/a", "anybody in between"),
        ("http://127.0.0.1.example.org/a", "anybody in between"),
        ("http://10.0.0.1/a", "anybody in between"),
    ],
)
def test_what_is_no_such_url_is_refused(reference: str, why: str) -> None:
    """With the reason, and with what to give instead."""
    with pytest.raises(ConfigError, match=why) as caught:
        RemoteFolder.parse(reference, FIRST)
    assert caught.value.fix


def test_no_secret_is_shown() -> None:
    """Neither password nor signature, in no form of text."""
    text = "https://me:sesame-7@host/v/?X-Amz-Signature=c0ffee77&v=1"
    remote = RemoteFolder.parse(text, FIRST)
    for told in (str(remote), repr(remote), shown(text), remote.key):
        assert "sesame" not in told
        assert "c0ffee" not in told
    assert str(remote) == "https://host/v/"
    assert {"sesame-7", "c0ffee77"} <= set(remote.secrets)
    with pytest.raises(ConfigError) as caught:
        RemoteFolder.parse(f"{text}#sesame-7", FIRST)
    assert "sesame" not in str(caught.value)
    assert "c0ffee" not in str(caught.value)


def test_a_reference_that_is_no_url_is_shown_as_it_is() -> None:
    """Folders and Hub ids hold no secrets."""
    assert [shown(text) for text in ("a/b@c", "/x?y=z#w")] == ["a/b@c", "/x?y=z#w"]
    assert not any(map(is_url, ("a/b@c", "/x", "a:b", "://x", "1a://x")))


def test_a_key_is_the_places_own() -> None:
    """A password does not make another place, a query may, and so does the scheme."""

    def key(reference: str) -> str:
        return RemoteFolder.parse(reference, FIRST).key

    assert key("https://me:sesame@host/v/") == key("https://host/v/vector.json")
    others = ["https://host/v", "https://host/v?a=1", "https://host/v?a=2", "https://host/w"]
    others += ["s3://host/v", "gs://host/v", "s3://me@host/v"]
    assert len({key(other) for other in others}) == len(others)
