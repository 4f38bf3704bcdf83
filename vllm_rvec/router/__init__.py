"""One OpenAI-compatible address for all variants; the request's `model` picks the variant.

Everything passes through unchanged. Imports neither torch nor vllm.
"""

from vllm_rvec.router.admin import Admin
from vllm_rvec.router.app import create_app
from vllm_rvec.router.proxy import create_client
from vllm_rvec.router.server import bind_socket, start_server
from vllm_rvec.router.variants import (
    UnknownVariantError,
    Upstream,
    VariantDownError,
    VariantFacts,
    VariantTable,
)

__all__ = [
    "Admin",
    "UnknownVariantError",
    "Upstream",
    "VariantDownError",
    "VariantFacts",
    "VariantTable",
    "bind_socket",
    "create_app",
    "create_client",
    "start_server",
]
