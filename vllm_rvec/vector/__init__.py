"""The stored vector: format, manifest, reading, extraction, compatibility with a target.

FORMAT.md beside this file is the specification. Importing this package imports no torch;
`extract` does, and so does reading a tensor.
"""

from vllm_rvec.vector.manifest import Manifest, TensorEntry
from vllm_rvec.vector.reader import VectorReader

__all__ = ["Manifest", "TensorEntry", "VectorReader"]
