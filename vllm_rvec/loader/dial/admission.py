"""Checks a request's alpha where vLLM takes requests in, before an engine sees it.

vLLM asks its logits processors whether they can do with a request's parameters, over HTTP and in
`vllm.LLM` alike. This one only answers that question; it leaves logits as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from vllm_rvec.loader.dial.vllm_seams import LogitsProcessor
from vllm_rvec.vector.dial import ALPHA_KEY, AlphaRequestError

if TYPE_CHECKING:
    import torch

    from vllm_rvec.loader.dial.vllm_seams import SamplingParams
    from vllm_rvec.vector.dial import Dial

__all__ = ["AlphaAdmission"]


class AlphaAdmission(LogitsProcessor):  # type: ignore[misc]  # vLLM is untyped here
    """Refuses alphas that the engine can't use."""

    dial: ClassVar[Dial | None] = None
    """What may be asked for. vLLM hands these checks no configuration, so whoever is in front of
    the engine in this process says it: the middleware, or `dial_arguments`."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Look at a request's alpha.

        Raises:
            ValueError: It can't be used, or nobody has said what can.
        """
        asked = (sampling_params.extra_args or {}).get(ALPHA_KEY)
        if asked is None:
            return
        if cls.dial is None:
            msg = (
                "alpha: this server was started without --middleware "
                "vllm_rvec.loader.dial.middleware.DialMiddleware, which knows the vectors"
            )
            raise AlphaRequestError(msg)
        cls.dial.of_value(asked)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        del vllm_config, device, is_pin_memory

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Change nothing."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """Whether greedy requests can do without it."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Nothing to keep."""
