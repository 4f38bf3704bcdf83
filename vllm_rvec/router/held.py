"""What a request has taken and gives back when it ends: places, counts, an answer.

`contextlib.ExitStack` does the same, and more, at several times the cost for every request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Held"]


class Held:
    """Things that are given back, the last one taken first.

    >>> held = Held()
    >>> held.add(lambda: print("first"))
    >>> held.add(lambda: print("second"))
    >>> held.give_back(down_to=1)
    second
    >>> held.give_back()
    first
    """

    __slots__ = ("_releases",)

    def __init__(self) -> None:
        self._releases: list[Callable[[], object]] = []

    def __len__(self) -> int:
        return len(self._releases)

    def add(self, release: Callable[[], object]) -> None:
        """Take something.

        Args:
            release: Gives it back. It does not fail.
        """
        self._releases.append(release)

    def give_back(self, *, down_to: int = 0) -> None:
        """Give back what was taken.

        Args:
            down_to: How many of the earliest stay.
        """
        while len(self._releases) > down_to:
            self._releases.pop()()
