"""What a dial engine answers to: names, alphas and their range. No torch, no vLLM.

A dial engine holds theta and each vector once and computes theta x + alpha (v x), so that every
request has alphas of its own, one for each vector. Here is how requests say them, the same for
router and engine:

    model: enhanced@0.5            one alpha for all vectors, in the model's name
    "alpha": 0.35                  in the body
    "alpha": {"reasoning": 0.7}    one for each vector that is named; 0 for the others
    X-Rvec-Alpha: 0.35             in a header, for clients that can't change bodies; or
    X-Rvec-Alpha: reasoning=0.7, style=-0.2

The body goes before the header, and the header before the model's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from vllm_rvec.checkpoint.remote import shown
from vllm_rvec.errors import ConfigError
from vllm_rvec.vector.alpha import alpha_problem, alpha_text, alphas_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_rvec.vector.recipe import RecipeVector

__all__ = [
    "ALPHA_HEADER",
    "ALPHA_KEY",
    "DEFAULT_RANGE",
    "VARIANT_HEADER",
    "AlphaRange",
    "AlphaRangeError",
    "AlphaRequestError",
    "Alphas",
    "Dial",
    "VectorDtype",
    "vector_names",
]

ALPHA_KEY: Final = "alpha"
"""The field of a request's body, and of vLLM's `vllm_xargs`."""
ALPHA_HEADER: Final = "X-Rvec-Alpha"
VARIANT_HEADER: Final = "X-Rvec-Variant"
"""Which variant is meant, in place of the body's `model`: of a router whose clients name an alias,
so that no body has to be rewritten. In answers: who answered."""
ENHANCED: Final = "enhanced@"
"""What stands before the alpha in the name of a variant that nobody listed."""

NUMBER = re.compile(r"[+-]?(?:[0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})(?:[eE][+-]?[0-9]{1,4})?")
"""How requests write a number. `float` takes more, such as line breaks, which a name that comes
back in a header must not have."""

Alphas = tuple[float, ...]
"""One for each vector, in the recipe's order."""


class AlphaRequestError(ValueError):
    """A request's alpha can't be used. The message is for its sender."""


class AlphaRangeError(AlphaRequestError):
    """A request's alpha is outside of what requests may choose."""


class AlphaRange(NamedTuple):
    """Between which alphas requests may choose, both ends included."""

    lowest: float
    highest: float

    @classmethod
    def parse(cls, text: str) -> AlphaRange:
        """Read `-1:2`.

        Raises:
            ConfigError: Not two numbers, or the first is larger.

        >>> AlphaRange.parse("-1:2")
        AlphaRange(lowest=-1.0, highest=2.0)
        """
        ends = text.split(":")
        try:
            lowest, highest = (float(end) for end in ends)
        except ValueError:
            lowest, highest = 1.0, 0.0
        if alpha_problem(lowest) or alpha_problem(highest) or lowest > highest:
            raise ConfigError(
                f"alpha range {text!r} can't be used",
                fix="give its two ends, the lower one first, such as -1:2",
            )
        return cls(lowest, highest)

    def __str__(self) -> str:
        return f"{alpha_text(self.lowest)}:{alpha_text(self.highest)}"


DEFAULT_RANGE: Final = AlphaRange(-1.0, 2.0)

VectorDtype = Literal["auto", "int8"]
"""How a dial keeps vectors: in the model's dtype, or as int8 with a scale a row."""


@dataclass(frozen=True, slots=True)
class Dial:
    """The vectors of a dial engine, its named variants, and the range of alphas."""

    vectors: tuple[str, ...]
    """The vectors' names."""
    variants: Mapping[str, Alphas]
    """What has a name of its own, listed to clients. These may lie outside the range."""
    allowed: AlphaRange = DEFAULT_RANGE
    """Of alphas that requests choose."""

    def of_model(self, name: str) -> Alphas | None:
        """Find the alphas that a model's name stands for.

        Args:
            name: A variant's, or `enhanced@A` with any A in range.

        Returns:
            None where no such model exists.

        >>> Dial(("v",), {"base": (0.0,)}).of_model("enhanced@0.5")
        (0.5,)
        """
        if name in self.variants:
            return self.variants[name]
        if not name.startswith(ENHANCED):
            return None
        text = name.removeprefix(ENHANCED)
        try:
            return self.of_value(self._parsed(text)) if NUMBER.fullmatch(text) else None
        except AlphaRequestError:
            return None

    def of_value(self, value: object) -> Alphas:
        """Read what a request's body says: a number, a list in order, or a mapping by name.

        Raises:
            AlphaRequestError: It is something else, names no vector, or is out of range, and no
                variant has these alphas.
        """
        return self._allowed(self._read(value))

    def _read(self, value: object) -> Alphas:
        if isinstance(value, Mapping):
            return self._of_names(value)
        if isinstance(value, list | tuple):
            if len(value) != len(self.vectors):
                msg = f"alpha has {len(value)} numbers, one for each vector would be "
                raise AlphaRequestError(msg + f"{len(self.vectors)}: {', '.join(self.vectors)}")
            return tuple(self._number(number) for number in value)
        return (self._number(value),) * len(self.vectors)

    def of_header(self, text: str) -> Alphas:
        """Read what a header says: `0.35`, or `reasoning=0.7, style=-0.2`.

        Raises:
            AlphaRequestError: As for `of_value`.
        """
        if "=" not in text:
            return self.of_value(self._parsed(text))
        pairs = (part.partition("=") for part in text.split(","))
        return self.of_value({name.strip(): self._parsed(number) for name, _, number in pairs})

    def text(self, alphas: Alphas) -> str:
        """Write alphas as the header has them.

        >>> Dial(("reasoning", "style"), {}).text((0.5, -1.0))
        'reasoning=0.5, style=-1'
        """
        if len(set(alphas)) == 1:
            return alpha_text(alphas[0])
        return alphas_text(dict(zip(self.vectors, alphas, strict=True)))

    def plain(self, alphas: Alphas) -> float | dict[str, float]:
        """Write alphas as a body has them: one number where they are all the same.

        >>> Dial(("reasoning", "style"), {}).plain((0.5, -1.0))
        {'reasoning': 0.5, 'style': -1.0}
        """
        if len(set(alphas)) == 1:
            return alphas[0]
        return dict(zip(self.vectors, alphas, strict=True))

    def with_variant(self, name: str, alphas: Alphas) -> Dial:
        """The same dial with a named variant that stands for other alphas."""
        return replace(self, variants={**self.variants, name: alphas})

    def is_misnamed(self, name: str) -> bool:
        """Whether a variant's name says an alpha that it does not have.

        >>> Dial(("v",), {"enhanced@1": (0.7,), "careful": (0.7,)}).is_misnamed("enhanced@1")
        True
        """
        said = name.removeprefix(ENHANCED)
        if name == "base":
            return any(self.variants[name])
        if said == name or not NUMBER.fullmatch(said):
            return False
        return set(self.variants[name]) != {float(said)}

    def _of_names(self, value: Mapping[object, object]) -> Alphas:
        if unknown := [str(name)[:100] for name in value if name not in self.vectors]:
            msg = f"no vector is called {', '.join(unknown[:8])}; there are "
            raise AlphaRequestError(msg + ", ".join(self.vectors))
        return tuple(self._number(value.get(name, 0.0)) for name in self.vectors)

    def _allowed(self, alphas: Alphas) -> Alphas:
        """Let alphas through that are in range, or a variant's."""
        low, high = self.allowed
        beyond = [alpha for alpha in alphas if not low <= alpha <= high]
        if beyond and alphas not in self.variants.values():
            msg = f"alpha {alpha_text(beyond[0])} is outside of {self.allowed}"
            raise AlphaRangeError(msg)
        return alphas

    @staticmethod
    def _parsed(text: str) -> float:
        if not NUMBER.fullmatch(text.strip()):
            msg = f"alpha {text.strip()[:40]!r} is not a number"
            raise AlphaRequestError(msg)
        return float(text)

    def _number(self, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            msg = "alpha must be a number, or a mapping from vectors to numbers"
            raise AlphaRequestError(msg)
        try:
            number = float(value)
        except OverflowError:
            number = float("inf")
        if problem := alpha_problem(number):
            msg = f"alpha {problem}"
            raise AlphaRequestError(msg)
        return number + 0.0  # -0.0 is 0.0


def vector_names(recipe: Sequence[RecipeVector]) -> tuple[str, ...]:
    """Name the vectors of a recipe, as requests do.

    Args:
        recipe: Each has `name`, or else is called as its folder is; later ones of one name get -2,
            -3 and so on.
    """
    names: list[str] = []
    for vector in recipe:
        name = vector.name or _last_part(vector.path)
        numbered = (f"{name}-{count}" for count in range(2, len(recipe) + 2))
        names.append(next(free for free in (name, *numbered) if free not in names))
    return tuple(names)


def _last_part(path: str) -> str:
    """Call a vector as its folder is, in characters that a header can hold."""
    plain = shown(path).split("#", 1)[0].split("@", 1)[0].rstrip("/")
    return re.sub(r"[^!-+\--<>-~]+", "-", plain.rsplit("/", 1)[-1]) or "vector"
