"""The dtype in which a tensor travels and is reduced: one table for eager and for compiled code.

gloo and NCCL move and add only some dtypes. The others (fp8, int16, ..) travel as bytes. Complex
numbers travel, and are added, as pairs of real numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGER = (torch.uint8, torch.int8, torch.int32, torch.int64)
# gloo and NCCL both move these dtypes. The other dtypes are viewed as one of them.
MOVED = frozenset({torch.bool, *_INTEGER, *_REAL})
# gloo and NCCL both reduce these dtypes; complex numbers as pairs of real numbers.
REDUCED = frozenset({*_INTEGER, *_REAL, torch.complex64, torch.complex128})


class WireFormat(NamedTuple):
    """What the tensors of an exchange are rounded to while they travel.

    Attributes:
        dtypes: for each tensor an fp8 dtype, or None: it travels as it is.
        rounding: "nearest", or "stochastic": up or down at random, right on average.
        generator: where the random numbers come from; None: torch's default generator.
        gradient: the same for the gradients of the tensors; None: they travel as they are.
    """

    dtypes: tuple[torch.dtype | None, ...]
    rounding: str = "nearest"
    generator: torch.Generator | None = None
    gradient: WireFormat | None = None


def moved(tensor: Tensor) -> Tensor:
    """Views a contiguous tensor as a row of elements of a dtype that every backend moves.

    Example:
        >>> moved(torch.zeros(2, 3, dtype=torch.float8_e4m3fn)).dtype
        torch.uint8
    """
    flat = tensor.view(-1)
    if tensor.dtype in MOVED:
        return flat
    if tensor.is_complex():
        return torch.view_as_real(flat).view(-1)
    # A single element is contiguous with any stride, but only stride 1 can be viewed as bytes.
    if flat.stride() != (1,):
        flat = flat.as_strided(flat.shape, (1,))
    return flat.view(torch.uint8)


def moved_back(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `moved`: views a row as elements of `dtype`.

    Example:
        >>> x = torch.tensor([1, -2], dtype=torch.int16)
        >>> moved_back(moved(x), torch.int16)
        tensor([ 1, -2], dtype=torch.int16)
    """
    if dtype in MOVED:
        return flat
    if dtype.is_complex:
        return torch.view_as_complex(flat.view(-1, 2))
    return flat.view(dtype)


def moved_counts(dtype: torch.dtype, counts: Sequence[int]) -> list[int]:
    """Turns counts of elements into counts of the elements that `moved` gives."""
    if dtype in MOVED:
        return list(counts)
    each = 2 if dtype.is_complex else dtype.itemsize
    return [count * each for count in counts]


def reduced(tensor: Tensor) -> Tensor:
    """Views a contiguous tensor as a row of elements of a dtype that every backend adds."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).view(-1)
