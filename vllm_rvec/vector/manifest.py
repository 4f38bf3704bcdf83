"""The manifest of a stored vector, as FORMAT.md describes it. Imports no torch."""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import math
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

import blake3
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from vllm_rvec.checkpoint.table import (
    FLOAT_DTYPES,
    READABLE,
    is_folder,
    is_there,
    what_it_is,
    why_no_folder,
    without_duplicates,
)
from vllm_rvec.errors import VectorCorruptError, VectorFormatError, VectorNotFoundError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "FORMAT_VERSION",
    "HASH_BYTES",
    "MANIFEST_NAME",
    "MAX_DIMENSIONS",
    "MAX_MANIFEST_BYTES",
    "SKETCH_SAMPLES",
    "Donor",
    "Donors",
    "Encoding",
    "Manifest",
    "Roundtrip",
    "Sketch",
    "Step",
    "StoredFile",
    "TensorEntry",
    "TokenizerFingerprint",
    "Vocabulary",
    "is_own",
    "is_tensor_name",
]

FORMAT_VERSION: Final = 1
MANIFEST_NAME = "vector.json"
MAX_MANIFEST_BYTES = 64 << 20
"""A larger manifest is refused unread: those of the largest models are a tenth of that."""
MAX_NAMES = 1 << 18
"""No object of a manifest has more names: the largest models have half as many tensors."""
MAX_OBJECTS = 1 << 20
"""Nor does a manifest hold more objects and lists; a text of brackets alone would take twenty
times its size once parsed."""
MAX_PROBLEMS = 50_000
"""Nor are more of its problems told: pydantic takes a kilobyte for each."""
SLICE_ENTRIES = 4096
"""So many tensors are checked before the next; a damaged manifest ends at the first such."""
MAX_DIMENSIONS: Final = 8
MAX_ELEMENTS = 1 << 48
"""No tensor has more elements; products of what a file claims stay small numbers."""

HASH_BYTES: Final = 2
"""Bytes of a token's hash."""
SKETCH_SAMPLES: Final = 64
"""Weights of one tensor in the sketch."""
SKETCH_BYTES = SKETCH_SAMPLES * 4

Encoding = Literal["zero", "dense", "sparse", "int8", "lowrank"]


def _check_blake3(digest: str) -> str:
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        msg = "a blake3 digest has 64 hexadecimal digits"
        raise ValueError(msg)
    return digest


def is_tensor_name(name: str) -> bool:
    """Tell whether a tensor of a vector can have a name."""
    return bool(name) and ":" not in name and name.isprintable()


def _check_tensor_name(name: str) -> str:
    if not is_tensor_name(name):
        msg = "a tensor's name is printable, not empty, and has no colon"
        raise ValueError(msg)
    return name


def _check_shard_name(name: str) -> str:
    if (
        PurePosixPath(name).name != name
        or not name.isprintable()
        or not name.endswith(".safetensors")
    ):
        msg = f"{name!r} is no name of a safetensors file in the vector's own folder"
        raise ValueError(msg)
    return name


Blake3 = Annotated[str, AfterValidator(_check_blake3)]
Magnitude = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=MAX_ELEMENTS)]
TensorName = Annotated[str, AfterValidator(_check_tensor_name)]
ShardName = Annotated[str, AfterValidator(_check_shard_name)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="after")
    def _check_complete(self, info: ValidationInfo) -> Self:
        # Defaults are a convenience for writers; a file says everything.
        missing = type(self).model_fields.keys() - self.model_fields_set
        if info.mode == "json" and missing:
            raise ValueError(f"without {', '.join(sorted(missing))}")
        return self


class Donor(_Record):
    """Where one side of the difference came from."""

    id: str
    """A Hub id, or the checkpoint folder's own name."""
    revision: str | None = None
    """The commit on the Hub."""
    license: str | None = None
    """As the checkpoint's model card says."""
    files: dict[str, Blake3] = Field(default_factory=dict)
    """Digest of each file that was read, by name."""


class Donors(_Record):
    """The pair whose difference the vector is."""

    tuned: Donor
    base: Donor


class Vocabulary(_Record):
    """Which rows of embedding and output head the vector has."""

    policy: Literal["strict", "common"] = "strict"
    """common: the donors had different numbers of rows, and the vector has those of both."""
    tuned_rows: Count | None = None
    base_rows: Count | None = None


class TensorEntry(_Record):
    """One tensor of the vector."""

    shape: Annotated[tuple[Count, ...], FailFast(), Field(max_length=MAX_DIMENSIONS)]
    """As in the donors, `[out, in]` for a linear weight."""
    dtype: str
    """What it decodes to, in safetensors' words: F32, BF16, F16; for zero the donors' own."""
    encoding: Encoding
    """How it is stored."""
    scaling: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Factor of a lowrank tensor's product."""
    norm: Magnitude = 0.0
    """Frobenius norm of the tensor as stored."""
    base_norm: Magnitude | None = None
    """Frobenius norm of the base donor's tensor."""
    changed: Count | None = None
    """How many elements of the exact difference are not zero."""
    error: Magnitude = 0.0
    """Relative Frobenius error of the encoding; 0 where it is lossless."""

    @property
    def elements(self) -> int:
        """How many elements the tensor has."""
        return math.prod(self.shape)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if math.prod(size or 1 for size in self.shape) > MAX_ELEMENTS:
            raise ValueError("more elements than any tensor has")
        if self.encoding != "zero" and self.dtype not in FLOAT_DTYPES:
            raise ValueError(f"a stored tensor is of {', '.join(FLOAT_DTYPES)}, not {self.dtype}")
        if self.encoding in {"int8", "lowrank"} and self.dtype != "F32":
            raise ValueError(f"{self.encoding} decodes to F32, not {self.dtype}")
        if self.encoding == "lowrank" and len(self.shape) != 2:
            raise ValueError("a lowrank tensor has two dimensions")
        if self.encoding == "int8" and not self.shape:
            raise ValueError("an int8 tensor has at least one dimension")
        if (self.encoding == "lowrank") != (self.scaling is not None):
            raise ValueError("scaling belongs to lowrank, and lowrank needs one")
        return self


class StoredFile(_Record):
    """One shard of the vector."""

    size_bytes: Annotated[int, Field(ge=0, lt=1 << 63)]
    blake3: Blake3


_ENTRIES = TypeAdapter(dict[TensorName, TensorEntry])
_FILES = TypeAdapter(dict[ShardName, StoredFile])


class Roundtrip(_Record):
    """How well base + 1 * v gives back tuned, in weights of tuned's dtype."""

    weights: Count
    exact: Count
    one_unit_off: Count
    """The next number of that dtype, or zero of the other sign."""
    further_off: Count


class TokenizerFingerprint(_Record):
    """The tuned donor's token for each id, as short hashes."""

    file: str
    """The file they were read from."""
    blake3: Blake3
    """That file's digest."""
    hashes: str
    """Base64: two bytes a token id."""

    @field_validator("hashes")
    @classmethod
    def _check_hashes(cls, text: str) -> str:
        if len(_packed(text)) % HASH_BYTES:
            raise ValueError("not two bytes for each token")
        return text

    @property
    def packed_hashes(self) -> bytes:
        """Two bytes for each token id, from id 0."""
        return _packed(self.hashes)


class Sketch(_Record):
    """A sample of the base donor's weights."""

    tensors: dict[TensorName, str]
    """By name, base64 of 64 little-endian float32."""

    @field_validator("tensors")
    @classmethod
    def _check_samples(cls, tensors: dict[str, str]) -> dict[str, str]:
        if any(len(_packed(text)) != SKETCH_BYTES for text in tensors.values()):
            raise ValueError(f"not {SKETCH_SAMPLES} float32 for each tensor")
        return tensors

    def packed_samples(self, name: str) -> bytes:
        """Return one tensor's 64 little-endian float32."""
        return _packed(self.tensors[name])


class Step(_Record):
    """One thing that was done to a vector after it was made."""

    operation: str
    """The command: transform, combine, random-like, ..."""
    parameters: dict[str, str] = Field(default_factory=dict)
    inputs: Annotated[tuple[Blake3, ...], FailFast()] = ()
    """Digests of the manifests of the vectors that were read."""
    created: str
    tool: str


class Manifest(_Record):
    """`vector.json`: see FORMAT.md for each field."""

    format: Literal["rvec"] = "rvec"
    format_version: Annotated[int, Field(ge=1, le=FORMAT_VERSION)] = FORMAT_VERSION
    # Not a Literal: that takes true for 1.
    formula: Literal["tuned - base", "scaling * B @ A"]
    complete: bool
    donors: Donors
    architecture: str
    model_type: str
    tie_word_embeddings: bool
    vocabulary: Vocabulary
    tensors: dict[TensorName, TensorEntry]
    files: dict[ShardName, StoredFile]
    roundtrip: Roundtrip | None
    tokenizer: TokenizerFingerprint | None
    sketch: Sketch | None
    lineage: Annotated[tuple[Step, ...], FailFast()]
    created: str
    tool: str
    digest: str = ""
    """blake3 of all the rest; see `sealed`. Of no meaning in a manifest that was not read."""

    @property
    def size_bytes(self) -> int:
        """What the shards take on disk."""
        return sum(file.size_bytes for file in self.files.values())

    def sealed(self) -> Manifest:
        """Return this manifest with its digest and everything checked again: what is written.

        Raises:
            ValidationError: It holds what no reader would take (`model_copy` checks nothing).
        """
        fields = json.loads(self.model_dump_json(exclude={"digest"}))
        return _validated(fields | {"digest": _digest_of(fields)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a vector folder's manifest.

        Raises:
            VectorNotFoundError: There is no such folder.
            VectorFormatError: It is no vector, or of a version that this reader does not know.
            VectorCorruptError: The manifest is not as it was written.
        """
        path = folder / MANIFEST_NAME
        if not is_folder(folder):
            raise VectorNotFoundError(
                f"there is no vector folder {folder}",
                why=_why(folder),
                fix="give a folder made by `vllm-rvec extract`",
                path=folder,
            )
        if not is_there(path):
            raise VectorFormatError(
                f"{folder} is no stored vector",
                why=", ".join(filter(None, (f"it holds no {MANIFEST_NAME}", what_it_is(folder)))),
                fix="give a folder made by `vllm-rvec extract`; vectors are safetensors with a "
                "manifest, pickle files are never read",
                path=folder,
            )
        try:
            data = _read(path)
        except PermissionError as exc:
            raise VectorFormatError(
                f"{path} can't be read", why="Permission denied", fix=READABLE, path=path
            ) from exc
        except (OSError, ValueError, RuntimeError) as exc:  # a loop of links
            raise _not_readable(str(path), [str(exc)], path) from exc
        return cls.parse(data, str(path), path)

    @classmethod
    def parse(cls, data: bytes, name: str, path: Path | None = None) -> Manifest:
        """Take in a manifest's bytes.

        Args:
            data: At most 64 MiB.
            name: What errors call it.
            path: Its file, if it is one.

        Raises:
            VectorFormatError: It is none, or of a version that this reader does not know.
            VectorCorruptError: It is not as it was written.
        """
        try:
            found = _parse(data)
            manifest = _validated(found)
        except ValidationError as exc:
            raise _not_readable(name, _problems(exc), path) from exc
        except (ValueError, RuntimeError) as exc:  # nested too deep
            raise _not_readable(name, [str(exc)], path) from exc
        if manifest.digest != _digest_of(found):
            raise VectorCorruptError(
                f"{name} is not as it was written",
                why="it does not match its own digest: it was edited or damaged",
                fix="copy or download the whole folder again",
                path=path,
            )
        return manifest


def is_own(path: Path, folder: Path) -> bool:
    """Tell whether a file is in its folder, or in the Hub's cache, where all files are links.

    Raises:
        OSError: It is missing, or a link that leads nowhere.
        RuntimeError: A loop of links.
    """
    real, home = path.resolve(strict=True), folder.resolve(strict=True)
    if real.parent == home:
        return True
    # CACHE/REPOSITORY/snapshots/COMMIT/file is a link to CACHE/REPOSITORY/blobs/DIGEST; that may be
    # one to CACHE/blobs/ab/abcdef..., the copy for all repositories of what came by Xet.
    if home.parent.name != "snapshots":
        return False
    repository = home.parent.parent
    return real.parent == repository / "blobs" or real.parent.parent == repository.parent / "blobs"


def _parse(data: bytes) -> dict[str, Any]:
    # Not bytes to json.loads: that takes UTF-16 and halves of surrogate pairs too.
    text = data.decode()
    if text.count("[") + text.count("{") > MAX_OBJECTS:
        raise ValueError(f"more than {MAX_OBJECTS} objects and lists")
    # Python's parser: pydantic's takes the last of two equal names without a word.
    found: dict[str, Any] = json.loads(text, object_pairs_hook=_object)
    return found  # or what else it holds: pydantic tells


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_NAMES:
        raise ValueError(f"more than {MAX_NAMES} names in one object")
    return without_duplicates(pairs)


def _validated(fields: dict[str, Any]) -> Manifest:
    if isinstance(fields, dict):
        _check_in_slices(fields.get("tensors"), _ENTRIES)
        _check_in_slices(fields.get("files"), _FILES)
    return Manifest.model_validate_json(json.dumps(fields, allow_nan=False))


def _check_in_slices(found: object, kind: TypeAdapter[Any]) -> None:
    """Check a large object piece by piece: pydantic gathers the problems of all it is given."""
    if isinstance(found, dict) and len(found) > SLICE_ENTRIES:
        items = iter(found.items())
        while piece := dict(itertools.islice(items, SLICE_ENTRIES)):
            kind.validate_json(json.dumps(piece, allow_nan=False))


def _digest_of(fields: dict[str, Any]) -> str:
    rest = {name: value for name, value in fields.items() if name != "digest"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return blake3.blake3(canonical.encode()).hexdigest()


def _packed(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise ValueError("not base64") from exc


def _read(path: Path) -> bytes:
    if not path.is_file() or path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError("no regular file of a manifest's size")
    if not is_own(path, path.parent):
        raise ValueError("a link out of the folder")
    return path.read_bytes()


def _not_readable(name: str, problems: list[str], path: Path | None) -> VectorFormatError:
    return VectorFormatError(
        f"{name} is no manifest that this version reads",
        problems=problems,
        why=f"this version reads format_version 1 to {FORMAT_VERSION}",
        fix="make the vector again, or use the version of vllm_rvec that wrote it",
        path=path,
    )


def _why(path: Path) -> str:
    why = why_no_folder(path)
    return f"{why}; a vector is a folder, never a pickle" if why == "it is a file" else why


def _problems(exc: ValidationError) -> list[str]:
    if exc.error_count() > MAX_PROBLEMS:
        return [f"{exc.error_count()} fields are not as they must be"]
    return [_problem(error["loc"], error["msg"]) for error in exc.errors(include_url=False)]


def _problem(location: tuple[int | str, ...], message: str) -> str:
    # Names that are not printable are among what is refused: shown, but not to the terminal.
    where = ".".join(ascii(part)[1:-1] if isinstance(part, str) else str(part) for part in location)
    return f"{where}: {message}" if where else message
