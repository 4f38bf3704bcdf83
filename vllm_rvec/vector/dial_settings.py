"""How people write a variant's alpha and a dial's range, in the files of `serve` and `route`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, Discriminator, Field, PlainValidator, Tag

from vllm_rvec.errors import ConfigError
from vllm_rvec.vector.alpha import AlphaNumber
from vllm_rvec.vector.dial import AlphaRange

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_rvec.vector.dial import Alphas

__all__ = ["Range", "VariantAlpha", "alphas_of", "refuse_bool"]


def refuse_bool(value: object) -> object:
    """Let no `true` pass for 1; for pydantic."""
    if isinstance(value, bool):
        msg = "should be a number, not true or false"
        raise ValueError(msg)  # noqa: TRY004 - pydantic collects ValueError, not TypeError
    return value


def _read_range(value: object) -> AlphaRange:
    if isinstance(value, AlphaRange):
        return value
    if not isinstance(value, str):
        msg = "should be the two ends, such as -1:2"
        raise ValueError(msg)  # noqa: TRY004 - as above
    try:
        return AlphaRange.parse(value)
    except ConfigError as exc:
        msg = f"{exc.what}; {exc.fix}"
        raise ValueError(msg) from None


def _kind_of_alpha(value: object) -> str:
    return "[names]" if isinstance(value, dict) else "[number]"


_Number = Annotated[AlphaNumber, BeforeValidator(refuse_bool)]
# By a tag: else pydantic tells each problem once for each form that an alpha can have.
# `problems_of` leaves out what stands in brackets.
VariantAlpha = Annotated[
    Annotated[_Number, Tag("[number]")]
    | Annotated[dict[str, _Number], Field(min_length=1), Tag("[names]")],
    Discriminator(_kind_of_alpha),
]
Range = Annotated[AlphaRange, PlainValidator(_read_range, json_schema_input_type=str)]


def alphas_of(alpha: float | dict[str, float], vectors: Sequence[str]) -> Alphas:
    """An alpha for each vector: the number, or what the mapping says, 0 for those not named."""
    if isinstance(alpha, dict):
        return tuple(alpha.get(name, 0.0) + 0.0 for name in vectors)  # -0.0 is 0.0
    return (alpha + 0.0,) * len(vectors)
