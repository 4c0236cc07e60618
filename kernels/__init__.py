"""The one kernel of this library, and the function that launches it.

Knows of tensors and strides, nothing of ranks. Importing it compiles nothing and needs neither a
GPU nor triton: kernels compile at their first launch.
"""

from .strided_copy import contiguous_copy, copy_all_valid_, copy_valid_, strided_copy_

__all__ = ["contiguous_copy", "copy_all_valid_", "copy_valid_", "strided_copy_"]
