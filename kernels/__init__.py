"""The one kernel of this library, and the function that launches it.

The package knows tensors and strides, but no ranks. An import compiles nothing, and needs neither a
GPU nor triton: the kernel compiles at its first launch.
"""

from .quantise import dequantise_, quantise_
from .strided_copy import contiguous_copy, copy_all_valid_, copy_valid_, strided_copy_

__all__ = [
    "contiguous_copy",
    "copy_all_valid_",
    "copy_valid_",
    "dequantise_",
    "quantise_",
    "strided_copy_",
]
