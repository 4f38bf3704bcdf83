"""The manifest of a stored vector, as FORMAT.md describes it. Imports no torch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_rvec.checkpoint.table import FLOAT_DTYPES, is_folder, why_no_folder, without_duplicates
from vllm_rvec.errors import VectorFormatError, VectorNotFoundError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["FORMAT_VERSION", "MANIFEST_NAME", "Donor", "Donors", "Manifest", "TensorEntry"]

FORMAT_VERSION: Final = 1
MANIFEST_NAME = "vector.json"
MAX_MANIFEST_BYTES = 256 << 20
"""A larger manifest is refused unread: those of the largest models are a thousandth of that."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


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

    @model_validator(mode="after")
    def _check_dtype(self) -> Self:
        if self.encoding == "dense" and self.dtype not in FLOAT_DTYPES:
            raise ValueError(f"a dense tensor is of {', '.join(FLOAT_DTYPES)}, not {self.dtype}")
        return self


class Manifest(_Record):
    """`vector.json`: see FORMAT.md for each field."""

    format: Literal["rvec"]
    format_version: Annotated[
        int, Field(ge=FORMAT_VERSION, le=FORMAT_VERSION)
    ]  # Literal takes true
    formula: Literal["tuned - base"]
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
        if not is_folder(folder):
            raise VectorNotFoundError(
                f"there is no vector folder {folder}",
                why=_why(folder),
                fix="give a folder made by `vllm-rvec extract`",
                path=folder,
            )
        if not path.exists():
            raise VectorFormatError(
                f"{folder} is no stored vector",
                why=f"it holds no {MANIFEST_NAME}",
                fix="give a folder made by `vllm-rvec extract`; vectors are safetensors with a "
                "manifest, pickle files are never read",
                path=folder,
            )
        try:
            # Python's parser first: pydantic's takes the last of two equal names without a word.
            found = json.loads(_read(path), object_pairs_hook=without_duplicates)
            return cls.model_validate_json(json.dumps(found))
        except ValidationError as exc:
            problems = [_problem(error["loc"], error["msg"]) for error in exc.errors()]
            raise _not_readable(path, problems) from exc
        except (OSError, ValueError, RecursionError) as exc:
            raise _not_readable(path, [str(exc)]) from exc


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError("too large for a manifest")
    return path.read_bytes()


def _not_readable(path: Path, problems: list[str]) -> VectorFormatError:
    return VectorFormatError(
        f"{path} is no manifest that this version reads",
        problems=problems,
        why=f"this version reads format_version {FORMAT_VERSION}",
        fix="make the vector again, or use the version of vllm_rvec that wrote it",
        path=path,
    )


def _why(path: Path) -> str:
    why = why_no_folder(path)
    return f"{why}; a vector is a folder, never a pickle" if why == "it is a file" else why


def _problem(location: tuple[int | str, ...], message: str) -> str:
    where = ".".join(map(str, location))
    return f"{where}: {message}" if where else message
