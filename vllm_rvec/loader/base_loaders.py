"""vLLM's own loaders under ours: the one that reads the target, and the one for a draft.

Not here: which formats can be used (`formats`), and what is added to their streams.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any, Final

from vllm_rvec.errors import ConfigError
from vllm_rvec.loader.formats import LOADER_PACKAGES
from vllm_rvec.loader.vllm_api import current_platform, get_model_loader

if TYPE_CHECKING:
    from vllm_rvec.loader.vllm_api import BaseModelLoader, LoadConfig

__all__ = ["draft_loader", "target_loader"]

CUDA_FORMATS: Final = ("fastsafetensors", "instanttensor")
"""They read straight into the memory of a CUDA device; vLLM names no other to them."""


def target_loader(
    load_config: LoadConfig, base_format: str, options: dict[str, Any]
) -> BaseModelLoader:
    """Make vLLM's loader for the target's own tensors.

    Args:
        load_config: vLLM's, for `--load-format rvec`.
        base_format: The format in its place.
        options: That loader's own keys.

    Raises:
        ConfigError: Its package is missing, or there is no device for it.
    """
    if base_format in CUDA_FORMATS and not current_platform.is_cuda_alike():
        raise ConfigError(
            f"base_format {base_format} needs a CUDA device",
            why=f"it reads into device memory; this vLLM runs on {current_platform.device_name}",
            fix="leave base_format out, or use runai_streamer",
        )
    if (package := LOADER_PACKAGES.get(base_format)) is not None:
        try:
            importlib.import_module(package.replace("-", "_"))
        except ImportError as exc:
            raise ConfigError(
                f"base_format {base_format} needs the package {package}",
                why=f"it can't be imported: {exc}",
                fix=f"pip install {package}, or leave base_format out",
            ) from exc
    return get_model_loader(
        dataclasses.replace(load_config, load_format=base_format, model_loader_extra_config=options)
    )


def draft_loader(load_config: LoadConfig) -> BaseModelLoader:
    """Make the loader that a speculative draft would have without us.

    Not the target's: fastsafetensors reads in step on all ranks, and in a pipeline only one has
    the draft; and a draft need not be of safetensors.
    """
    return get_model_loader(
        dataclasses.replace(load_config, load_format="auto", model_loader_extra_config={})
    )
