"""A vector's tensors as they are stored: what can be done with them without decoding them whole.

`StoredTensor.read` decodes any stretch of elements; `fuse_view` adds stored tensors to a view of a
target's tensor, straight into where the sum goes. The loader and merge work with these: a rank
adds its own slices only (of columns of a sparse or low-rank tensor whole rows are decoded), and
memory does not grow with a tensor's size.
"""

from vllm_rvec.vector.stored.fusing import Term, fuse_view
from vllm_rvec.vector.stored.opening import open_stored
from vllm_rvec.vector.stored.padded import PaddedTensor
from vllm_rvec.vector.stored.team import Team
from vllm_rvec.vector.stored.tensor import Compact, StoredTensor

__all__ = ["Compact", "PaddedTensor", "StoredTensor", "Team", "Term", "fuse_view", "open_stored"]
