"""Serve a language model with a reasoning vector added to its weights while vLLM loads it.

The package's rooms, from the ground up: `errors`, `arithmetic` (the one formula), `checkpoint`
(safetensors checkpoints), `vector` (the stored vector), `loader` (the vLLM plugin), `serve`
(engine processes), `router` (one address for all variants), `cli` (the commands).

Importing this module imports neither torch nor vllm.
"""

from vllm_rvec.errors import RvecError

__all__ = ["RvecError", "__version__"]

__version__ = "0.1.0"
