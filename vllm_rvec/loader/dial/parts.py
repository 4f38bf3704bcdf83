"""What makes an engine of vLLM's a dial, beside the load format: classes for four of its flags.

`serve` has the same words for a command line (it does not import this package); a test holds the
two together.
"""

from __future__ import annotations

import os
from typing import Any, Final

from vllm_rvec.loader import LOAD_FORMAT

__all__ = [
    "ADMISSION",
    "ENVIRONMENT",
    "FLAGS",
    "MIDDLEWARE",
    "SCHEDULER",
    "WORKER",
    "dial_arguments",
]

WORKER: Final = "vllm_rvec.loader.dial.worker.DialWorker"
SCHEDULER: Final = "vllm_rvec.loader.dial.scheduler.DialScheduler"
ADMISSION: Final = "vllm_rvec.loader.dial.admission:AlphaAdmission"
MIDDLEWARE: Final = "vllm_rvec.loader.dial.middleware.DialMiddleware"
ENVIRONMENT: Final = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
"""vLLM's second model runner orders a batch in kernels of its own, past what `runner` can see."""

FLAGS: Final = (
    f"--worker-cls {WORKER} --scheduler-cls {SCHEDULER} --logits-processors {ADMISSION} "
    f"--middleware {MIDDLEWARE}, and VLLM_USE_V2_MODEL_RUNNER=0 in the environment"
)
"""For vLLM's own server."""


def dial_arguments(**extra: Any) -> dict[str, Any]:
    """Make the keywords for `vllm.LLM` of an engine that answers any alpha.

    Sets VLLM_USE_V2_MODEL_RUNNER in this process, and tells the check of requests what may be asked
    for: one dial in a process at a time.

    Args:
        extra: The loader's keys: `vector` or `vectors`, `alpha_range`, ...

    Returns:
        Keywords; requests then say `SamplingParams(extra_args={"alpha": 0.5})`.

    Raises:
        ConfigError: A key is wrong.
    """
    from vllm_rvec.loader.config import LoaderConfig  # noqa: PLC0415 - vLLM, seconds
    from vllm_rvec.loader.dial.admission import AlphaAdmission  # noqa: PLC0415 - as above

    given = {"mode": "dial", **extra}
    AlphaAdmission.dial = LoaderConfig.split(given)[0].dial
    os.environ.update(ENVIRONMENT)
    return {
        "load_format": LOAD_FORMAT,
        "model_loader_extra_config": given,
        "worker_cls": WORKER,
        "scheduler_cls": SCHEDULER,
        "logits_processors": [ADMISSION],
    }
