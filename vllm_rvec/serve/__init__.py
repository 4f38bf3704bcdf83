"""Engines as processes: the configuration, the plan, one engine, and the supervisor of them all.

Imports neither torch nor vllm: an engine is a command.
"""

from vllm_rvec.serve.config import (
    ServeConfig,
    VariantConfig,
    load_config,
    parse_alphas,
    variant_name,
    variants_from_alphas,
)
from vllm_rvec.serve.console import EngineConsole
from vllm_rvec.serve.engine import EngineProcess, describe_exit
from vllm_rvec.serve.engine_log import root_cause
from vllm_rvec.serve.mode import ModeChoice, choose_mode, model_facts
from vllm_rvec.serve.plan import EngineSpec, Variant, plan_engines
from vllm_rvec.serve.supervisor import EngineState, Pace, Supervisor

__all__ = [
    "EngineConsole",
    "EngineProcess",
    "EngineSpec",
    "EngineState",
    "ModeChoice",
    "Pace",
    "ServeConfig",
    "Supervisor",
    "Variant",
    "VariantConfig",
    "choose_mode",
    "describe_exit",
    "load_config",
    "model_facts",
    "parse_alphas",
    "plan_engines",
    "root_cause",
    "variant_name",
    "variants_from_alphas",
]
