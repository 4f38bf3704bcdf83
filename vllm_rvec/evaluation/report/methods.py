"""How the numbers of a report were calculated, in sentences that every report ends with."""

from __future__ import annotations

from typing import Final

__all__ = ["METHODS"]

METHODS: Final = """\
Every arm is asked the same problems; arms are compared on those that both answered. Over several \
tasks each problem weighs the same.
Accuracy: Wilson's 95 % score interval (1927).
Difference of two arms: Tango's 95 % score interval for paired rates (1998); p is McNemar's test, \
mid-p, two-sided (Fagerland, Lydersen and Laake 2013). Gained: only the arm is right; lost: only \
the reference is.
p, Holm: adjusted by Holm's method (1979) for the number of alphas that were compared with the \
same reference on the same problems; in the confirmation for the number of tasks; in the table of \
losses and gains for the number of families.
Held out: half of the problems choose the alpha with the highest accuracy (of equals the one \
nearest 0); the other half tests it once. A recommendation needs a difference whose interval lies \
above 0 and p < 0.05 against base, base+prompt and the random vector: all that were asked.
What could have been found: Connor's formula (1987) for McNemar's test at 5 % with 80 % power, at \
the share of problems on which the two arms were seen to differ.
Times as long: geometric mean of the ratio of tokens on the same problems.
""".splitlines()
