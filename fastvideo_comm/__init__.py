"""Triton-accelerated communication for sequence-parallel video diffusion."""

from .autograd import DistributedAutograd
from .communicator import DeviceCommunicatorBase
from .utils import divide, ensure_divisibility, split_tensor_along_last_dim

__version__ = "0.1.0"

__all__ = [
    "DeviceCommunicatorBase",
    "DistributedAutograd",
    "__version__",
    "divide",
    "ensure_divisibility",
    "split_tensor_along_last_dim",
]
