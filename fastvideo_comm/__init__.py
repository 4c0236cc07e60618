"""Triton-accelerated communication for sequence-parallel video diffusion."""

from .attention import ulysses_attention
from .autograd import DistributedAutograd
from .communicator import DeviceCommunicatorBase
from .handle import AsyncHandle
from .stateless import StatelessProcessGroup
from .utils import divide, ensure_divisibility, near_even_sizes, split_tensor_along_last_dim

__version__ = "0.1.0"

__all__ = [
    "AsyncHandle",
    "DeviceCommunicatorBase",
    "DistributedAutograd",
    "StatelessProcessGroup",
    "__version__",
    "divide",
    "ensure_divisibility",
    "near_even_sizes",
    "split_tensor_along_last_dim",
    "ulysses_attention",
]
