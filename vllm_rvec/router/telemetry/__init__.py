"""What the router tells about its work: an observation of each answer, metrics, an access log.

Nothing here decides where a request goes, and nothing here changes what a client gets.
"""

from vllm_rvec.router.telemetry.access_log import AccessLog, AccessRecord, trace_id
from vllm_rvec.router.telemetry.latencies import Latencies
from vllm_rvec.router.telemetry.metrics import ErrorKind, Metrics, RequestLabels, ShadowResult
from vllm_rvec.router.telemetry.observation import Observation, Outcome

__all__ = [
    "AccessLog",
    "AccessRecord",
    "ErrorKind",
    "Latencies",
    "Metrics",
    "Observation",
    "Outcome",
    "RequestLabels",
    "ShadowResult",
    "trace_id",
]
