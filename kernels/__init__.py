"""The kernels of this library, and the functions that launch them.

The package knows tensors and strides. Only `posts.py` and `deliver.py` know of ranks: as numbers of
places in memory that are written to, and nothing of groups. An import compiles nothing, and needs
neither a GPU nor triton: a kernel compiles at its first launch.
"""

from .quantise import dequantise_, quantise_
from .strided_copy import (
    contiguous_copy,
    copy_all_valid_,
    copy_valid_,
    implementation_on_cpu,
    strided_copy_,
)

__all__ = [
    "contiguous_copy",
    "copy_all_valid_",
    "copy_valid_",
    "dequantise_",
    "implementation_on_cpu",
    "quantise_",
    "strided_copy_",
]
