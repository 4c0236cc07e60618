"""The one kernel of this library, and the function that launches it.

Knows of tensors and strides, nothing of ranks. Importing it compiles nothing and needs neither a
GPU nor triton: kernels compile at their first launch.
"""

from .strided_copy import strided_copy_

__all__ = ["strided_copy_"]
