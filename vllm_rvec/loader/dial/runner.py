"""Telling a model's modules which token of the batch has which alpha: vLLM's first model runner.

A mixin: `worker` puts it before the platform's own runner. The runner's batch has its order when
`_prepare_inputs` has been called, and that method's counts say how many tokens each request has.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_rvec.loader.dial.turns import Turns
from vllm_rvec.vector.dial import ALPHA_KEY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_rvec.loader.dial.layers import Batch
    from vllm_rvec.vector.dial import Alphas, Dial

__all__ = ["DialRunner"]


class DialRunner:
    """What is added to vLLM's model runner. Names of ours begin with `rvec`."""

    rvec_batch: Batch
    rvec_dial: Dial
    rvec_default: Alphas
    """Of requests that say nothing."""
    rvec_rehearsing: bool

    def rvec_attach(self, batch: Batch, dial: Dial, default: Alphas) -> None:
        """Take over what the loader has made.

        Args:
            batch: What the modules look at.
            dial: What requests may ask for.
            default: What they get when they ask for nothing.
        """
        self.rvec_batch, self.rvec_dial, self.rvec_default = batch, dial, default
        self.rvec_rehearsing = False
        self._rvec_off = batch.tokens
        self._rvec_alphas: dict[str, tuple[Any, Alphas]] = {}
        self._rvec_last: tuple[np.ndarray, np.ndarray] | None = None

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        runner: Any = super()
        prepared = runner._prepare_inputs(scheduler_output, num_scheduled_tokens)  # noqa: SLF001
        self._rvec_turn(num_scheduled_tokens)
        return prepared

    def _rvec_turn(self, counts: np.ndarray) -> None:
        """Set the alphas of this step: `counts` tokens for each request, in the batch's order."""
        me: Any = self
        known, now = self._rvec_alphas, {}
        for name in me.input_batch.req_ids:
            params = me.requests[name].sampling_params
            # An id may be another request's by now.
            is_known = name in known and known[name][0] is params
            now[name] = known[name] if is_known else (params, self._rvec_read(params))
        self._rvec_alphas = now
        requests = np.asarray([alphas for _, alphas in now.values()], dtype=np.float32)
        if self._rvec_last is not None and all(
            np.array_equal(old, new)
            for old, new in zip(self._rvec_last, (requests, counts), strict=True)
        ):
            return
        self._rvec_last = (requests, counts.copy())
        batch = self.rvec_batch
        tokens = np.repeat(requests, counts, axis=0)
        batch.tokens = Turns(tokens, me.device)
        # One row each goes through the head: the last of each request.
        batch.samples = batch.tokens if len(tokens) == len(requests) else Turns(requests, me.device)
        if len(batch.static_alphas):
            batch.static_alphas.zero_()
            batch.static_alphas[: len(tokens)].copy_(torch.from_numpy(tokens))

    def _rvec_read(self, params: Any) -> Alphas:
        given = (params.extra_args if params is not None else None) or {}
        asked = given.get(ALPHA_KEY)
        return self.rvec_default if asked is None else self.rvec_dial.of_value(asked)

    def _get_prompt_logprobs_dict(self, hidden_states: Any, num_scheduled_tokens: Any) -> Any:
        """One request at a time: all of its rows go through the head, at its own alphas."""
        me: Any = self
        runner: Any = super()
        waiting = me.num_prompt_logprobs
        found: dict[str, Any] = {}
        samples = self.rvec_batch.samples
        try:
            for name in list(waiting):
                _, alphas = self._rvec_alphas.get(name, (None, self.rvec_default))
                self.rvec_batch.samples = Turns.all_at(alphas, me.device)
                me.num_prompt_logprobs = {name: waiting[name]}
                found |= runner._get_prompt_logprobs_dict(hidden_states, num_scheduled_tokens)  # noqa: SLF001
                if not me.num_prompt_logprobs:
                    del waiting[name]
        finally:
            me.num_prompt_logprobs, self.rvec_batch.samples = waiting, samples
        return found

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        runner: Any = super()
        with self._rvec_dummy_turn():
            return runner._dummy_run(*args, **kwargs)  # noqa: SLF001

    def _dummy_sampler_run(self, *args: Any, **kwargs: Any) -> Any:
        runner: Any = super()
        with self._rvec_dummy_turn():
            return runner._dummy_sampler_run(*args, **kwargs)  # noqa: SLF001

    @contextmanager
    def _rvec_dummy_turn(self) -> Iterator[None]:
        """No alpha for tokens that nobody sent; one for all of them when memory is measured."""
        batch, me = self.rvec_batch, self
        ones = [1.0] * batch.vectors
        turns = Turns.all_at(ones, me.device) if self.rvec_rehearsing else self._rvec_off  # type: ignore[attr-defined]  # vLLM's runner has it
        batch.tokens = batch.samples = turns
        self._rvec_last = None
        try:
            yield
        finally:
            batch.tokens = batch.samples = self._rvec_off

    def rvec_rehearse(self, tokens: int) -> dict[str, set[int]]:
        """Run a few tokens that nobody sent at alpha 1, and say which modules took part.

        Returns:
            By module: the numbers of rows that it was given.
        """
        me: Any = self
        called = self.rvec_batch.called = {}
        self.rvec_rehearsing = True
        try:
            hidden, _ = me._dummy_run(tokens, is_profile=True)  # noqa: SLF001
            with self._rvec_dummy_turn():
                me.model.compute_logits(hidden[:tokens])
                # Multimodal models look tokens up before they run.
                ids = torch.zeros(tokens, dtype=torch.long, device=me.device)
                me.get_model().embed_input_ids(ids)
        finally:
            self.rvec_rehearsing, self.rvec_batch.called = False, None
        return called
