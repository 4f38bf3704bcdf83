"""The manifest of a stored vector, as FORMAT.md describes it. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_rvec.errors import VectorFormatError, VectorNotFoundError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["FORMAT_VERSION", "MANIFEST_NAME", "Donor", "Donors", "Manifest", "TensorEntry"]

FORMAT_VERSION: Final = 1
MANIFEST_NAME = "vector.json"
MAX_MANIFEST_BYTES = 256 << 20
"""A larger manifest is refused unread: 405B-size models need about 200 KB."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Donor(_Record):
    """Where one side of the difference came from."""

    name: str
    """The checkpoint folder's own name."""
    config_sha256: str
    """SHA-256 of its config.json, in hexadecimal."""


class Donors(_Record):
    """The pair whose difference the vector is."""

    tuned: Donor
    base: Donor


class TensorEntry(_Record):
    """One tensor of the vector."""

    shape: tuple[Annotated[int, Field(ge=0)], ...]
    """As in the donors, `[out, in]` for a linear weight."""
    dtype: str
    """In safetensors' words: F32, BF16, F16; for zero tensors the donors' own."""
    encoding: Literal["dense", "zero"]
    """dense: in a shard. zero: all elements are zero, nothing is stored."""


class Manifest(_Record):
    """`vector.json`: see FORMAT.md for each field."""

    format: Literal["rvec"] = "rvec"
    format_version: Literal[1] = FORMAT_VERSION
    formula: Literal["tuned - base"] = "tuned - base"
    donors: Donors
    architecture: str
    model_type: str
    tie_word_embeddings: bool
    tensors: dict[str, TensorEntry]
    created: str
    tool: str

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a vector folder's manifest.

        Raises:
            VectorNotFoundError: There is no such folder.
            VectorFormatError: It is no vector, or of a version that this reader does not know.
        """
        path = folder / MANIFEST_NAME
        if not folder.is_dir():
            raise VectorNotFoundError(
                f"there is no vector folder {folder}",
                why=_why_no_folder(folder),
                fix="give a folder made by `vllm-rvec extract`",
                path=folder,
            )
        if not path.is_file():
            raise VectorFormatError(
                f"{folder} is no stored vector",
                why=f"it holds no {MANIFEST_NAME}",
                fix="give a folder made by `vllm-rvec extract`; vectors are safetensors with a "
                "manifest, pickle files are never read",
                path=folder,
            )
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise VectorFormatError(f"{path} is too large for a manifest", path=path)
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as exc:
            raise VectorFormatError(
                f"{path} is no manifest that this version reads",
                problems=[_problem(error["loc"], error["msg"]) for error in exc.errors()],
                why=f"this version reads format_version {FORMAT_VERSION}",
                fix="make the vector again, or use the version of vllm_rvec that wrote it",
                path=path,
            ) from exc


def _why_no_folder(path: Path) -> str:
    if path.is_file():
        return "it is a file; a vector is a folder of safetensors and a manifest, never a pickle"
    return "the path does not exist"


def _problem(location: tuple[int | str, ...], message: str) -> str:
    where = ".".join(map(str, location))
    return f"{where}: {message}" if where else message
