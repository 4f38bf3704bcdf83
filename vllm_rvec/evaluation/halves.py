"""Which half of a task's problems a problem belongs to: one half chooses alpha, the other confirms.

By a hash, as the router assigns users: no list has to be kept, a problem stays in its half when
others are added, and every arm and every resumed sweep agrees.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import blake3

if TYPE_CHECKING:
    from vllm_rvec.evaluation.records import Half

__all__ = ["half_of", "hash_of"]


def half_of(task_name: str, problem_id: str, seed: int = 0) -> Half:
    """Tell a problem's half; each has the same probability.

    Args:
        task_name: Two tasks deal their problems independently of each other.
        problem_id: The problem's id.
        seed: Another seed deals anew.

    >>> half_of("gsm8k", "1"), half_of("gsm8k", "3")
    ('confirm', 'choose')
    """
    return "confirm" if hash_of(str(seed), task_name, problem_id)[0] & 1 else "choose"


def hash_of(*parts: str) -> bytes:
    """BLAKE3 of some texts, with their lengths: `a|b` and `c` must not be `a` and `b|c`."""
    # JSON may hold lone surrogates.
    encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
    return blake3.blake3(b"".join(b"%d:%s|" % (len(part), part) for part in encoded)).digest()
