"""Which alphas a request asks for, and which variant has them.

The body goes before the header, and that before the model's name. A dial answers any in its range,
and its engine is told which; an engine at one alpha answers where it is that one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_rvec.router.openai_errors import RequestRefusedError
from vllm_rvec.vector.alpha import alpha_text, alphas_text
from vllm_rvec.vector.dial import ALPHA_HEADER, VARIANT_HEADER, AlphaRangeError, AlphaRequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from multidict import CIMultiDictProxy
    from pydantic import JsonValue

    from vllm_rvec.router.variants import VariantTable
    from vllm_rvec.vector.dial import Alphas, Dial

__all__ = ["AlphaWish", "Settled", "invalid_alpha", "settle"]

ONE_ALPHA = ". Engines started with `--mode dial` answer any."


@dataclass(frozen=True, slots=True)
class AlphaWish:
    """What a request says about alpha."""

    body: JsonValue
    header: str | None

    @classmethod
    def of(cls, body: JsonValue, headers: CIMultiDictProxy[str]) -> AlphaWish | None:
        """Read a request's; None where it says nothing.

        Args:
            body: `alpha` of its body; None where it has none.
            headers: The client's.
        """
        header = ", ".join(headers.getall(ALPHA_HEADER)) if ALPHA_HEADER in headers else None
        return None if body is None and header is None else cls(body, header)

    def variant(self, variants: VariantTable, preferred: Sequence[str]) -> str:
        """Find who has these alphas.

        Args:
            variants: What there is.
            preferred: Variants that are taken first, where several have them.

        Raises:
            RequestRefusedError: They can't be read (400), or nobody has them (404).
        """
        if variants.dial is None or not variants.dial.variants:
            number = self._number()
            if number is None:
                raise invalid_alpha("alpha must be a number")
            return self._listed(variants, preferred, number)
        try:
            alphas = self.of_dial(variants.dial)
        except AlphaRangeError as exc:
            return self._listed(variants, preferred, self._number(), str(exc))
        except AlphaRequestError as exc:
            raise invalid_alpha(str(exc)) from None
        return self._of_dial_or_listed(variants, variants.dial, preferred, alphas)

    def of_dial(self, dial: Dial) -> Alphas:
        """These alphas, one for each of a dial's vectors.

        Raises:
            AlphaRequestError: They can't be read, or are out of range.
        """
        if self.body is not None:
            return dial.of_value(self.body)
        return dial.of_header(self.header or "")

    def _of_dial_or_listed(
        self, variants: VariantTable, dial: Dial, preferred: Sequence[str], alphas: Alphas
    ) -> str:
        for name in dict.fromkeys([*preferred, *variants.names()]):
            if variants.is_of_dial(name):
                if dial.of_model(name) == alphas:
                    return name
            elif _has(variants, name, dial.plain(alphas)):
                return name
        name = f"enhanced@{alpha_text(alphas[0])}"
        # An engine that is only called so, and not the dial's, may have any alpha.
        if len(set(alphas)) == 1 and variants.is_of_dial(name) and dial.of_model(name) == alphas:
            return name
        # A mixture has no name of its own; whose name it goes under makes no difference.
        return next((n for n in preferred if variants.is_of_dial(n)), next(iter(dial.variants)))

    def _listed(
        self,
        variants: VariantTable,
        preferred: Sequence[str],
        number: float | None,
        problem: str = "",
    ) -> str:
        names = dict.fromkeys([*preferred, *variants.names()])
        found = next((name for name in names if _has(variants, name, number)), None)
        if found is not None:
            return found
        there = ", ".join(
            f"{name} ({_text(facts.alpha)})"
            for name in variants.names()
            if (facts := variants.facts(name)) is not None and facts.alpha is not None
        )
        more = f", or any alpha in {variants.alpha_range}." if variants.alpha_range else ONE_ALPHA
        raise RequestRefusedError(
            404,
            f"{problem[:1].upper()}{problem[1:]}." if problem else "No variant has this alpha.",
            code="alpha_not_found",
            param="alpha",
            fix=f"There are: {there or 'none whose alpha is known'}{more}",
        )

    def _number(self) -> float | None:
        """The one number that is asked for; None where it is none."""
        value = _parsed(self.header or "") if self.body is None else self.body
        if isinstance(value, bool) or not isinstance(value, float | int):
            return None
        return value


@dataclass(frozen=True, slots=True)
class Settled:
    """What a request gets."""

    said: str | None
    """The alphas, as the answer's header says them; None where they are not known."""
    engine_headers: Mapping[str, str | None]
    """What the engine is sent in place of the client's headers of these names."""


def settle(
    variants: VariantTable,
    name: str,
    asked: str,
    wish: AlphaWish | None,
    *,
    is_generating: bool = True,
) -> Settled:
    """Find what is said of a request's alphas, to its client and to the engine.

    Args:
        variants: Who answers for which name.
        name: The variant that answers.
        asked: What the body names, perhaps an alias.
        wish: The alphas that it asks for; this variant has them.
        is_generating: Whether the answer depends on alpha. Else a dial's engine is not told: on
            paths that it can't apply alpha on, it refuses the header.
    """
    dial = variants.dial
    if dial is None or not variants.is_of_dial(name):
        facts = variants.facts(name)
        return Settled(None if facts is None or facts.alpha is None else _text(facts.alpha), {})
    alphas = dial.of_model(name) if wish is None else wish.of_dial(dial)
    if alphas is None:  # the table has this name, and it is the same dial
        raise KeyError(name)
    said = dial.text(alphas)
    return Settled(
        said,
        {
            # Also where the body says it: on some paths the engine reads the header only.
            ALPHA_HEADER: said if is_generating else None,
            VARIANT_HEADER: name if name != asked else None,
        },
    )


def invalid_alpha(problem: str, fix: str = "") -> RequestRefusedError:
    """The error for an alpha that can't be read."""
    what = f"{problem[:1].upper()}{problem[1:]}."
    return RequestRefusedError(400, what, code="invalid_alpha", param="alpha", fix=fix)


def _has(variants: VariantTable, name: str, alpha: object) -> bool:
    """Whether a variant has one alpha, and it is this one; a name that is none has no facts."""
    facts = variants.facts(name) if variants.has(name) else None
    return facts is not None and facts.alpha is not None and facts.alpha == alpha


def _parsed(header: str) -> float | None:
    try:
        return float(header)
    except ValueError:
        return None


def _text(alpha: float | Mapping[str, float]) -> str:
    return alpha_text(alpha) if isinstance(alpha, float | int) else alphas_text(alpha)
