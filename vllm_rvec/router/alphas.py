"""Which alphas a request asks for, and whether it can have them.

With a dial, the body goes before the header, and the header before the model's name; the engine is
told what came out. A fused engine has one alpha: vLLM would pass over a wish for another without a
word, so it is refused here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_rvec.router.openai_errors import RequestRefusedError
from vllm_rvec.vector.alpha import alpha_text, alphas_text
from vllm_rvec.vector.dial import ALPHA_HEADER, AlphaRequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from multidict import CIMultiDictProxy
    from pydantic import JsonValue

    from vllm_rvec.router.variants import VariantFacts, VariantTable
    from vllm_rvec.vector.dial import Alphas, Dial

__all__ = ["Settled", "invalid_alpha", "settle"]


@dataclass(frozen=True, slots=True)
class Settled:
    """What a request gets."""

    said: str | None
    """The alphas, as the answer's header says them; None where they are not known."""
    engine_headers: Mapping[str, str | None]
    """What the engine is sent in place of the client's headers of these names."""


def settle(
    variants: VariantTable, name: str, body_alpha: JsonValue, headers: CIMultiDictProxy[str]
) -> Settled:
    """Find the alphas of a request.

    Args:
        variants: Who answers for which name.
        name: The model that it asks for, which is there.
        body_alpha: `alpha` of its body; None where it has none.
        headers: The client's.

    Raises:
        RequestRefusedError: They can't be read, are out of range, or are not those of a fused
            engine.
    """
    header = ", ".join(headers.getall(ALPHA_HEADER)) if ALPHA_HEADER in headers else None
    if variants.dial is None:
        facts = variants.facts(name)
        _check_fused(name, facts, body_alpha, header)
        return Settled(None if facts is None else _text(facts), {})
    dial = variants.dial
    said = dial.text(_of_dial(dial, name, body_alpha, header))
    # The engine reads a body's alpha itself.
    return Settled(said, {ALPHA_HEADER: said if body_alpha is None else None})


def invalid_alpha(problem: str, fix: str = "") -> RequestRefusedError:
    """The error for an alpha that can't be had."""
    what = f"{problem[:1].upper()}{problem[1:]}."
    return RequestRefusedError(400, what, code="invalid_alpha", param="alpha", fix=fix)


def _of_dial(dial: Dial, name: str, body_alpha: JsonValue, header: str | None) -> Alphas:
    try:
        if body_alpha is not None:
            return dial.of_value(body_alpha)
        if header is not None:
            return dial.of_header(header)
    except AlphaRequestError as exc:
        raise invalid_alpha(str(exc)) from None
    alphas = dial.of_model(name)
    if alphas is None:  # the table has this name, and it is the same dial
        raise KeyError(name)
    return alphas


def _check_fused(
    name: str, facts: VariantFacts | None, body_alpha: JsonValue, header: str | None
) -> None:
    if facts is None or (body_alpha is None and header is None):
        return
    asked = _parsed(header or "") if body_alpha is None else body_alpha
    if asked == facts.alpha and not isinstance(asked, bool):
        return
    raise invalid_alpha(
        f"the engine of `{name}` was started at one alpha, {_text(facts)} now",
        fix="Leave `alpha` out, or have the server started with `--mode dial`, which answers any.",
    )


def _parsed(header: str) -> float | None:
    try:
        return float(header)
    except ValueError:
        return None


def _text(facts: VariantFacts) -> str:
    if isinstance(facts.alpha, float | int):
        return alpha_text(facts.alpha)
    return alphas_text(facts.alpha)
