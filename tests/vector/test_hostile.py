"""Vectors made to do harm: an error of ours that names the file, no crash, no hang, no bomb."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.privileges import without_privileges
from tests.support.tiny_vectors import edit_manifest, example, redigest, reseal, write_vector
from vllm_rvec.errors import VectorCorruptError, VectorFormatError
from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.verification import examine

if TYPE_CHECKING:
    from collections.abc import Callable

OURS = (VectorFormatError, VectorCorruptError)

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
"""What a true header says of the tensor `t`."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound vector with one dense tensor `t` of shape [2, 3]."""
    return write_vector(tmp_path / "v", {"t": example("dense_f32")})


def write_shard(path: Path, header: bytes, data: bytes = bytes(24), *, length: int = -1) -> None:
    """Write a safetensors file by hand; `length` is what it claims of its header."""
    path.write_bytes(struct.pack("<Q", len(header) if length < 0 else length) + header + data)


def forge(folder: Path, header: bytes, data: bytes = bytes(24), *, length: int = -1) -> None:
    """Replace the shard, and make the manifest's digests fit: nothing but the shard is wrong."""
    write_shard(folder / "vector.safetensors", header, data, length=length)
    redigest(folder)


def refused(folder: Path) -> VectorFormatError | VectorCorruptError:
    with pytest.raises(OURS) as caught:
        VectorReader(folder)
    error = caught.value
    assert isinstance(error, OURS)
    return error


def test_a_shard_written_by_hand_is_read(folder: Path) -> None:
    """So that what is refused below is refused for its one fault."""
    forge(folder, json.dumps({"t": ENTRY}).encode())
    assert not examine(VectorReader(folder)).problems


HEADERS: dict[str, bytes | list[dict[str, Any]] | dict[str, Any]] = {
    "no JSON": b"nonsense",
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "cut off": b'{"t":{"dtype":"F32","shape":[2,3]',
    "UTF-16": json.dumps({"t": ENTRY}).encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + json.dumps({"t": ENTRY}).encode(),
    "no UTF-8": b'{"\xff":1}',
    "half a surrogate pair": b'{"\\ud800":' + json.dumps(ENTRY).encode() + b"}",
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "nested metadata": b'{"__metadata__":' + b'{"a":' * 1000 + b"}" * 1001,
    "a name twice": b'{"t":%s,"t":%s}' % ((json.dumps(ENTRY).encode(),) * 2),
    "a field twice": b'{"t":{"dtype":"F32","dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}',
    "metadata twice": b'{"__metadata__":{},"__metadata__":{},"t":%s}' % json.dumps(ENTRY).encode(),
    "metadata that is no text": {"__metadata__": {"a": 1}, "t": ENTRY},
    "no fields": {"t": {}},
    "no object": {"t": 1},
    "unknown dtype": {"t": ENTRY | {"dtype": "F99"}},
    "dtype of another size": {"t": ENTRY | {"dtype": "BF16"}},
    "dtype of the same size": {"t": ENTRY | {"dtype": "I32"}},
    "negative shape": {"t": ENTRY | {"shape": [-2, -3]}},
    "fractional shape": {"t": ENTRY | {"shape": [2.0, 3]}},
    "boolean shape": {"t": ENTRY | {"shape": [True, 6]}},
    "huge shape": {"t": ENTRY | {"shape": [2**63, 2]}},
    "shape that wraps around": {"t": ENTRY | {"shape": [2**32, 2**32, 6]}},
    "shape beyond 64 bits": {"t": ENTRY | {"shape": [2**64 + 2, 3]}},
    "number of 5000 digits": b'{"t":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}",
    "another shape of that size": {"t": ENTRY | {"shape": [3, 2]}},
    "another rank of that size": {"t": ENTRY | {"shape": [2, 3, 1]}},
    "offsets backwards": {"t": ENTRY | {"data_offsets": [24, 0]}},
    "offsets beyond the file": {"t": ENTRY | {"data_offsets": [24, 48]}},
    "huge offsets": {"t": ENTRY | {"data_offsets": [2**64 - 24, 2**64]}},
    "negative offsets": {"t": ENTRY | {"data_offsets": [-24, 0]}},
    "fractional offsets": {"t": ENTRY | {"data_offsets": [0.0, 24.0]}},
    "boolean offsets": {"t": ENTRY | {"data_offsets": [False, 24]}},
    "one offset": {"t": ENTRY | {"data_offsets": [0]}},
    "a hole before": {"t": {"dtype": "F32", "shape": [5], "data_offsets": [4, 24]}},
    "a hole behind": {"t": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}},
    "overlap": {"t": ENTRY, "u": {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]}},
    "twice the same bytes": {"t": ENTRY, "u": ENTRY},
    "no tensor": {},
    "another name": {"u": ENTRY},
    "one more, of no bytes": {
        "t": ENTRY,
        "u": {"dtype": "F32", "shape": [0], "data_offsets": [24, 24]},
    },
    "parts of another encoding": {"t:values": ENTRY},
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_lies_is_refused(folder: Path, kind: str) -> None:
    """The digests are right, the header is not: the file or the tensor is named."""
    header = HEADERS[kind]
    forge(folder, header if isinstance(header, bytes) else json.dumps(header).encode())
    message = str(refused(folder))
    assert "vector.safetensors" in message or "t:" in message or "\n  - u" in message


@pytest.mark.parametrize(
    "length", [1, 25, 2**20, 2**25 + 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
)
def test_a_header_length_that_lies_is_refused(folder: Path, length: int) -> None:
    """Nothing is allocated, or read, by that claim."""
    forge(folder, json.dumps({"t": ENTRY}).encode(), length=length)
    assert refused(folder).path == folder / "vector.safetensors"


@pytest.mark.parametrize("content", [b"", b"\0", bytes(7), bytes(8), bytes(100), b"\x80\x04N."])
def test_a_shard_that_is_no_safetensors_is_refused(folder: Path, content: bytes) -> None:
    """Empty, short, zeros, a pickle."""
    (folder / "vector.safetensors").write_bytes(content)
    redigest(folder)
    assert refused(folder).path == folder / "vector.safetensors"


TEXTS: dict[str, bytes] = {
    "empty": b"",
    "a number": b"3",
    "a list": b"[]",
    "cut off": b'{"format": "rvec"',
    "nested": b"[" * 200_000,
    "nested objects": b'{"format":' * 200_000,
    "a name twice": b'{"format": "rvec", "format": "rvec"}',
    "no UTF-8": b'{"format": "\xff"}',
    "encoded surrogate": b'{"format": "\xed\xa0\x80"}',
    "NUL": b'{"format": "rvec"}\0',
    "number of 5000 digits": b'{"format_version": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_manifest_that_is_no_such_json_is_refused(folder: Path, kind: str) -> None:
    """The file is named; no traceback of a parser."""
    (folder / "vector.json").write_bytes(TEXTS[kind])
    assert refused(folder).path == folder / "vector.json"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_a_manifest_in_another_encoding_is_refused(folder: Path, encoding: str) -> None:
    """Python's parser would take most of these; other readers would not."""
    path = folder / "vector.json"
    path.write_bytes(path.read_text().encode(encoding))
    assert refused(folder).path == path


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("field", ["norm", "scaling", "error"])
def test_a_number_that_is_none_is_refused(tmp_path: Path, number: str, field: str) -> None:
    """Literals that JSON does not have, and numbers that overflow to infinity."""
    folder = write_vector(tmp_path / "v", {"t": example("lowrank")})
    fields = json.loads((folder / "vector.json").read_text())
    fields["tensors"]["t"][field] = "HERE"
    text = json.dumps(fields).replace('"HERE"', number)
    (folder / "vector.json").write_text(text)
    assert isinstance(refused(folder), VectorFormatError)


@pytest.mark.parametrize("name", ["twice", "tw\\u0069ce"])
def test_a_tensor_that_stands_twice_is_refused(folder: Path, name: str) -> None:
    """However the second is spelled: readers would differ on which one counts."""
    path = folder / "vector.json"
    fields = json.loads(path.read_text())
    entry = json.dumps(fields["tensors"]["t"])
    fields["tensors"] = "HERE"
    reseal(folder)
    path.write_text(json.dumps(fields).replace('"HERE"', f'{{"twice":{entry},"{name}":{entry}}}'))
    assert "a name stands twice" in str(refused(folder))


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a link to a kernel file": lambda path: path.symlink_to("/proc/kmsg"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nowhere.safetensors"),
    "a link out of the folder": lambda path: path.symlink_to(path.parent.parent / "outside"),
    "a link through ..": lambda path: path.symlink_to("../outside"),
}


@pytest.mark.parametrize("file", ["vector.json", "vector.safetensors"])
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.timeout(20)
def test_what_is_no_file_of_the_folder_is_refused(folder: Path, file: str, kind: str) -> None:
    """Nothing is opened that could wait, never end, or belong to somebody else."""
    path = folder / file
    path.rename(folder.parent / "outside")
    SPECIAL[kind](path)
    assert file in str(refused(folder))


def test_a_link_within_the_folder_is_no_harm(folder: Path) -> None:
    """It leads to what the folder holds anyway."""
    (folder / "vector.safetensors").rename(folder / "data")
    (folder / "vector.safetensors").symlink_to("data")
    assert VectorReader(folder).tensor("t") is not None


@pytest.mark.parametrize("closed", ["vector.json", "vector.safetensors", "."])
def test_what_may_not_be_read_is_refused(closed: str) -> None:
    """With the system's reason, and as an error of ours, whichever file it is."""
    with without_privileges() as home:
        folder = write_vector(home / "v", {"t": example("dense_f32")})
        (folder / closed).chmod(0)
        assert "Permission denied" in str(refused(folder))
        (folder / closed).chmod(0o755)


def test_a_file_that_shrank_after_opening_is_an_error(folder: Path) -> None:
    """Its size is compared when it is mapped; the tensor is named."""
    vector = VectorReader(folder)
    shard = folder / "vector.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(VectorCorruptError, match="now") as caught:
        vector.tensor("t")
    assert caught.value.tensor_name == "t"


def test_a_file_that_grew_after_opening_is_an_error(folder: Path) -> None:
    """It is another file than the one whose header was read."""
    vector = VectorReader(folder)
    with (folder / "vector.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(VectorCorruptError, match="now"):
        vector.tensor("t")


def claim(folder: Path, name: str, **changes: Any) -> Path:
    """Forge what the manifest says of one tensor."""
    fields = json.loads((folder / "vector.json").read_text())
    fields["tensors"][name] |= changes
    edit_manifest(folder, tensors=fields["tensors"])
    return folder


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("dense_f32", [1 << 40]),
        ("sparse_bitmap", [1 << 40]),
        ("int8", [1 << 20, 1 << 20]),
        ("lowrank", [1 << 20, 1 << 20]),
    ],
)
def test_a_shape_that_the_parts_belie_is_refused(
    tmp_path: Path, kind: str, shape: list[int]
) -> None:
    """Manifest and headers must agree before anything is made by either."""
    folder = claim(write_vector(tmp_path / "v", {"t": example(kind)}), "t", shape=shape)
    error = refused(folder)
    assert isinstance(error, VectorCorruptError)
    assert error.tensor_name == "t"


@pytest.mark.parametrize("shape", [[0], [3, 0], [0, 3], [1 << 30, 0, 1 << 17]])
def test_tensors_of_no_elements_are_decoded(tmp_path: Path, shape: list[int]) -> None:
    """int8 of no columns, say: an empty tensor, no division by nothing."""
    folder = write_vector(tmp_path / "v", {"t": example("int8")})
    rows = 1
    for size in shape[:-1]:
        rows *= size
    if rows > 1000:
        pytest.skip("its scales alone would be the bomb: refused by the file's size")
    header = {
        "t:scale": {"dtype": "F32", "shape": [rows], "data_offsets": [0, 4 * rows]},
        "t:int8": {"dtype": "I8", "shape": shape, "data_offsets": [4 * rows, 4 * rows]},
    }
    write_shard(folder / "vector.safetensors", json.dumps(header).encode(), bytes(4 * rows))
    redigest(claim(folder, "t", shape=shape))
    vector = VectorReader(folder)
    assert not examine(vector).problems
    tensor = vector.tensor("t")
    assert tensor is not None
    assert list(tensor.shape) == shape


CHILD = """
import resource, sys
from pathlib import Path
from vllm_rvec.errors import VectorCorruptError, VectorFormatError
from vllm_rvec.vector.reader import VectorReader
from vllm_rvec.vector.verification import examine

folder, allowed_bytes = Path(sys.argv[1]), int(sys.argv[2])
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + allowed_bytes
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    found = examine(VectorReader(folder))
    print("problems" if found.problems else "sound")
except (VectorFormatError, VectorCorruptError) as exc:
    print("refused", len(str(exc)))
"""

THREADS_BYTES = 200 << 20
"""What threads reserve of the address space, and never touch."""
EXPANSION = 20
"""FORMAT.md: how much larger than its text a parsed manifest or header is at most."""


def judged(folder: Path) -> str:
    """Open and verify in a process that may take little more than the files' own size."""
    manifest, shards = folder / "vector.json", folder.glob("*.safetensors")
    size_bytes = manifest.stat().st_size + sum(shard.stat().st_size for shard in shards)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, folder, str(THREADS_BYTES + EXPANSION * size_bytes)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()[0]


def many_tensors(folder: Path) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    forge(folder, json.dumps({str(number): empty for number in range(60_000)}).encode(), b"")


def a_million_tensors(folder: Path) -> None:
    empty = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = ",".join(f'"{number}":{empty}' for number in range(1_000_000))
    forge(folder, f"{{{text}}}".encode(), b"")


def manifest_of(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "vector.json").write_text(text)


def write_raw(folder: Path, **changes: Any) -> None:
    path = folder / "vector.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def false_tensors(folder: Path) -> None:
    write_raw(folder, tensors={str(number): {} for number in range(100_000)})


def false_steps(folder: Path) -> None:
    write_raw(folder, lineage=[1] * 1_000_000)


def false_shape(folder: Path) -> None:
    write_raw(folder, tensors={"t": {"shape": ["1"] * 1_000_000}})


BOMBS: dict[str, Callable[[Path], object]] = {
    "a header of 60,000 tensors": many_tensors,
    "a header of a million tensors": a_million_tensors,
    "a manifest of 65 MiB": manifest_of(" " * (65 << 20)),
    "a manifest of brackets": manifest_of("[" + "[]," * (10 << 20) + "[]]"),
    "a manifest of names": manifest_of(
        "{" + ",".join(f'"{number}":1' for number in range(400_000)) + "}"
    ),
    "a manifest of strings": manifest_of('["' + '","'.join(map(str, range(600_000))) + '"]'),
    "a manifest of false tensors": false_tensors,
    "a manifest of false steps": false_steps,
    "a shape of a million": false_shape,
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_in_memory_bounded_by_the_files(folder: Path, kind: str) -> None:
    """Under a limit on the address space, and in seconds."""
    BOMBS[kind](folder)
    assert judged(folder) == "refused"


def test_a_tiny_file_with_a_vast_sparse_tensor_is_verified_in_small_memory(tmp_path: Path) -> None:
    """Verifying never makes the tensor; gaps may lead anywhere in 2^40 elements."""
    folder = write_vector(tmp_path / "v", {"t": example("sparse_gaps_u16")})
    assert judged(claim(folder, "t", shape=[1 << 40])) == "sound"
    assert judged(claim(folder, "t", shape=[1000])) == "problems"


def test_a_lowrank_product_of_terabytes_is_verified_in_small_memory(tmp_path: Path) -> None:
    """Factors of four megabytes; the product is refused when it is asked for."""
    folder = write_vector(tmp_path / "v", {"t": example("lowrank")})
    size = 1 << 20
    header = {
        "t:lora_A": {"dtype": "F32", "shape": [1, size], "data_offsets": [0, 4 * size]},
        "t:lora_B": {"dtype": "F32", "shape": [size, 1], "data_offsets": [4 * size, 8 * size]},
    }
    write_shard(folder / "vector.safetensors", json.dumps(header).encode(), bytes(8 * size))
    redigest(claim(folder, "t", shape=[size, size]))
    assert judged(folder) == "sound"
    with pytest.raises(VectorFormatError, match="this machine has") as caught:
        VectorReader(folder).tensor("t")
    assert caught.value.tensor_name == "t"


def test_a_copy_of_the_whole_folder_is_sound(folder: Path, tmp_path: Path) -> None:
    """Nothing in a vector depends on where it is."""
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert judged(copy) == "sound"
