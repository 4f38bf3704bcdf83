"""A vector as it is added to a target: the same for loader and merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from vllm_rvec.errors import ConfigError
from vllm_rvec.vector.alpha import alpha_problem
from vllm_rvec.vector.compatibility.structure import Pairing
from vllm_rvec.vector.recipe import tensor_alphas
from vllm_rvec.vector.stored import PaddedTensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_rvec.vector.reader import VectorReader
    from vllm_rvec.vector.recipe import RecipeVector
    from vllm_rvec.vector.stored import Term

__all__ = ["Addend"]


@dataclass(frozen=True, slots=True)
class Addend:
    """A stored vector, how it goes with the target, and how much of it is added."""

    reader: VectorReader
    """The stored vector."""
    pairing: Pairing
    """Which of its tensors goes with which of the target's."""
    alphas: Mapping[str, float]
    """By the vector's own names; tensors without one add nothing."""

    @classmethod
    def of(
        cls,
        reader: VectorReader,
        alpha: float,
        vocabulary: str,
        recipe: RecipeVector | None = None,
        *,
        is_partial: bool = False,
    ) -> Self:
        """Put a vector and what a recipe says of it together.

        Args:
            reader: The vector.
            alpha: Multiplies what the recipe says.
            vocabulary: One of `VOCABULARY_POLICIES`.
            recipe: Where in the model it is added, and how much of it; all of it where None.
            is_partial: Whether it is for the language part of a multimodal target.

        Raises:
            ConfigError: The recipe does not fit the vector, a product of alphas is beyond the
                range of float32, or there is no such policy.
        """
        manifest = reader.manifest
        if recipe is None:
            own = dict.fromkeys(manifest.tensors, 1.0)
        else:
            own = tensor_alphas(recipe, manifest.tensors, is_complete=manifest.complete)
        only = None if recipe is None else own.keys()
        pairing = Pairing(manifest, vocabulary, only=only, is_partial=is_partial)
        alphas = {name: alpha * value for name, value in own.items()}
        _check_range(alphas, alpha)
        return cls(reader, pairing, alphas)

    def term(self, name: str, shape: tuple[int, ...]) -> Term | None:
        """Return what is added to a target's tensor, in its shape, and its alpha.

        Rows that the vector lacks get zeros of a sign that makes their product -0.0, so that adding
        it leaves every bit of those rows as it is.

        Args:
            name: The target's tensor.
            shape: The target's shape.

        Returns:
            None where nothing is added: the part is zero, there is none, it does not fit, or
            policy or recipe skip it. Whether that is allowed is the structure check's business.

        Raises:
            VectorCorruptError: The vector's shard can't be read.
        """
        part = self.pairing.part_for(name)
        if part is None or (alpha := self.alphas.get(part, 0.0)) == 0:
            return None
        if self.pairing.is_skipped(name) or not self.pairing.fits(name, shape):
            return None
        if (stored := self.reader.stored(part)) is None:
            return None
        if stored.shape != shape:
            stored = PaddedTensor(stored, shape, -0.0 if alpha > 0 else 0.0)
        return stored, alpha


def _check_range(alphas: Mapping[str, float], alpha: float) -> None:
    problems = [
        f"{name}: {alphas[name]} {why}" for name in alphas if (why := alpha_problem(alphas[name]))
    ]
    if problems:
        raise ConfigError(
            f"alpha {alpha} times the recipe's gives numbers that can't be used",
            problems=problems,
            why="the formula takes alpha in float32",
        )
