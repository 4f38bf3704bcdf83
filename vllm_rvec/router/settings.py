"""What every part of the router's configuration has in common.

Each part's settings stand beside their owner (`shadow`, `keyring`, ...); `config` puts them
together.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Settings"]


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
