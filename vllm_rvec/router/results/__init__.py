"""What was served and what it was worth: kept in SQLite, and summed up in clear words."""

from vllm_rvec.router.results.reader import read_experiments
from vllm_rvec.router.results.report import ExperimentSummary, VariantSummary
from vllm_rvec.router.results.rows import Exposure, Outcome
from vllm_rvec.router.results.schema import ResultsUnavailableError
from vllm_rvec.router.results.store import ResultsConfig, ResultsStore

__all__ = [
    "ExperimentSummary",
    "Exposure",
    "Outcome",
    "ResultsConfig",
    "ResultsStore",
    "ResultsUnavailableError",
    "VariantSummary",
    "read_experiments",
]
