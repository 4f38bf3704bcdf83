"""vLLM's scheduler, with the prefix cache of each alpha kept apart: `--scheduler-cls`.

Keys and values depend on the weights, so those of one alpha must not answer for another's. vLLM
hashes a request's blocks with its `cache_salt`; here the alphas become part of that salt, whoever
sent the request: HTTP, or `vllm.LLM`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from vllm_rvec.loader.config import LoaderConfig
from vllm_rvec.loader.dial.vllm_seams import AsyncScheduler, Scheduler
from vllm_rvec.vector.alpha import alpha_text
from vllm_rvec.vector.dial import ALPHA_KEY

if TYPE_CHECKING:
    from vllm_rvec.loader.dial.vllm_seams import Request
    from vllm_rvec.vector.dial import Alphas

__all__ = ["DialScheduler", "salt_of"]

MARK: Final = "rvec"


class _AlphaSalted:
    """Salts requests as they come in; before vLLM's own scheduler in the order of classes."""

    requests: dict[str, Request]
    """vLLM's own, by id."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        parent: Any = super()
        parent.__init__(vllm_config, *args, **kwargs)
        config, _ = LoaderConfig.split(vllm_config.load_config.model_loader_extra_config)
        self._rvec_dial = config.dial
        self._rvec_default = config.default_alphas

    def add_request(self, request: Request) -> None:
        """Queue a request, its blocks hashed with its alphas."""
        params = request.sampling_params
        session = self.requests.get(request.request_id)
        if session is not None and params is not None and session.sampling_params is not None:
            # More input for a session: its cache has the alphas that it began with.
            own = (session.sampling_params.extra_args or {}).get(ALPHA_KEY)
            params.extra_args = {**(params.extra_args or {}), ALPHA_KEY: own}
        asked = (params.extra_args or {}).get(ALPHA_KEY) if params is not None else None
        alphas = self._rvec_default if asked is None else self._rvec_dial.of_value(asked)
        if salt := salt_of(alphas, request.cache_salt):
            request.cache_salt = salt
            request.block_hashes = []
            request.update_block_hashes()
        parent: Any = super()
        parent.add_request(request)


def salt_of(alphas: Alphas, own: str | None) -> str:
    """Make the salt of a request of its alphas, one for each vector, and its own salt.

    No two requests of other alphas have the same, whatever salts they bring. Empty where there is
    nothing to tell apart: the target's own cache is that of a plain engine.

    >>> salt_of((0.5,), None), salt_of((0.0,), "mine"), salt_of((0.0,), "rvec 0.5")
    ('rvec 0.5', 'mine', 'rvec 0 rvec 0.5')
    """
    if not any(alphas) and not (own or "").startswith(MARK):
        return own or ""
    ours = " ".join([MARK, *(alpha_text(alpha + 0.0) for alpha in alphas)])
    return f"{ours} {own}" if own else ours


class DialScheduler(_AlphaSalted, AsyncScheduler):  # type: ignore[misc]  # vLLM is untyped here
    """vLLM's asynchronous scheduler, for which this one stands in.

    It is vLLM's synchronous one where that was asked for (`--no-async-scheduling`).
    """

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        if cls is DialScheduler and not vllm_config.scheduler_config.async_scheduling:
            return SyncDialScheduler(vllm_config, *args, **kwargs)
        return super().__new__(cls)


class SyncDialScheduler(_AlphaSalted, Scheduler):  # type: ignore[misc]  # as above
    """The same for vLLM's synchronous scheduler."""
