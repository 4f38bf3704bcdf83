"""What every part of the router's configuration has in common.

Each part's settings stand beside their owner (`shadow`, `keyring`, ...); `config` puts them
together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

__all__ = ["PathText", "Settings"]


def _beside(path: str, info: ValidationInfo) -> str:
    """Take a relative path from the file's folder, which is what settings are checked in."""
    if path == "-" or not isinstance(info.context, Path):
        return path
    return str((info.context / path).absolute())


PathText = Annotated[str, Field(min_length=1), AfterValidator(_beside)]
"""A path; `-` stays what it is."""


class Settings(BaseModel):
    """Settings that people write: frozen, unknown keys refused, no value quoted in an error."""

    # Strict about types where YAML is: `port: true` is no port, `"5"` no number.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )
