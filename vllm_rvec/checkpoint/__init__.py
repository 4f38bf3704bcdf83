"""Hugging Face safetensors checkpoints: what is in a folder, read lazily, written streaming.

Not here: what the tensors mean. Importing this package imports no torch; `reader` and `writer` do.
"""

from vllm_rvec.checkpoint.table import TensorInfo, TensorTable, read_table

__all__ = ["TensorInfo", "TensorTable", "read_table"]
