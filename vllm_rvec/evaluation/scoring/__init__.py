"""How answers are graded: scorers by name, and `grade`.

Not here: where the answers come from (`asking`) and what follows from the grades (`statistics`).
"""

from vllm_rvec.evaluation.scoring.registry import SCORERS, checked_options, grade, scorer_named
from vllm_rvec.evaluation.scoring.scorer import Scorer, ScorerOptions

__all__ = ["SCORERS", "Scorer", "ScorerOptions", "checked_options", "grade", "scorer_named"]
