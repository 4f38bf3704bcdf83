"""The classes of vLLM's that a dial's worker and runner are made of, for this platform.

Beside `vllm_api`, since only workers may import them: vLLM's worker of a CPU changes how its
process shares memory. Tested with vLLM 0.32.0; `tests/loader/dial/test_vllm_seams.py` fails where a
method that `runner` overrides is no longer there or takes something else.
"""

from vllm_rvec.loader.vllm_api import current_platform

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner as PlatformRunner
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as PlatformRunner
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

__all__ = ["PlatformRunner", "PlatformWorker"]
