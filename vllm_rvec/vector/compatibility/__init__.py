"""Whether a vector belongs to a target: structure, tokenizer, lineage. Imports no torch.

`check_target` asks all three of a target on disk and returns a `Report`; the loader puts one
together from what streams by.
"""

from vllm_rvec.vector.compatibility.check import check_lineage, check_target
from vllm_rvec.vector.compatibility.report import Finding, Level, Report, Verdict

__all__ = ["Finding", "Level", "Report", "Verdict", "check_lineage", "check_target"]
