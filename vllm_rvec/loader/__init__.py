"""The vLLM plugin: `--load-format rvec` adds a stored vector to a target while it loads.

The only package that imports vllm. Importing it imports neither vllm nor torch; `register`, which
vLLM calls in each of its processes (entry point group `vllm.general_plugins`), does.
"""

from functools import cache

__all__ = ["LOAD_FORMAT", "register"]

LOAD_FORMAT = "rvec"
"""The name after `--load-format`."""


@cache
def register() -> None:
    """Register the load format with vLLM. May be called any number of times."""
    from vllm_rvec.loader.model_loader import RvecModelLoader  # noqa: PLC0415 - vLLM, seconds
    from vllm_rvec.loader.vllm_api import register_model_loader  # noqa: PLC0415 - as above

    register_model_loader(LOAD_FORMAT)(RvecModelLoader)
