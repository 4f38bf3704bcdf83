"""One OpenAI-compatible address for all variants; the request's `model` picks the variant.

Everything passes through unchanged. Imports neither torch nor vllm.
"""

from vllm_rvec.router.admin import Admin
from vllm_rvec.router.app import create_app
from vllm_rvec.router.config import (
    RouteConfig,
    Routing,
    load_route_config,
    load_routing,
)
from vllm_rvec.router.keyring import hash_key
from vllm_rvec.router.sending import create_client
from vllm_rvec.router.server import bind_socket, check_exposure, load_tls, start_server
from vllm_rvec.router.services import Services
from vllm_rvec.router.upstreams import Upstream
from vllm_rvec.router.variants import (
    UnknownVariantError,
    VariantDownError,
    VariantFacts,
    VariantTable,
)

__all__ = [
    "Admin",
    "RouteConfig",
    "Routing",
    "Services",
    "UnknownVariantError",
    "Upstream",
    "VariantDownError",
    "VariantFacts",
    "VariantTable",
    "bind_socket",
    "check_exposure",
    "create_app",
    "create_client",
    "hash_key",
    "load_route_config",
    "load_routing",
    "load_tls",
    "start_server",
]
