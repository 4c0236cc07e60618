"""The floats of PTX on arrays of 64 bits, for ptx_arithmetic.py."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

_FP8 = {"e4m3x2": torch.float8_e4m3fn, "e5m2x2": torch.float8_e5m2}
_HALVES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


def float_of(bits: Array) -> Array:
    return bits.astype(np.uint32).view(np.float32)


def bits_of(value: Array) -> Array:
    return value.view(np.uint32).astype(np.uint64)


def of_floats(operation: Callable[..., Array], *operands: Array) -> Array:
    """The bits of what an operation makes of floats."""
    with np.errstate(all="ignore"):  # infinities and NaNs are meant
        return bits_of(operation(*map(float_of, operands)))


def compared_floats(name: str, a: Array, b: Array) -> Array:
    """An ordered comparison, which is false for a NaN."""
    x, y = float_of(a), float_of(b)
    return getattr(operator, name)(x, y) & ~np.isnan(x) & ~np.isnan(y)


def converted_floats(kinds: list[str], *operands: Array) -> Array:
    """`cvt` from, to or between floats. Of two results the first operand is the upper one."""
    if kinds == ["f32", "bf16"]:
        return (operands[0] & np.uint64(0xFFFF)) << np.uint64(16)
    if kinds == ["f32", "f16"]:
        return bits_of(operands[0].astype(np.uint16).view(np.float16).astype(np.float32))
    if kinds == ["rzi", "s32", "f32"]:
        return np.trunc(float_of(operands[0])).astype(np.int64).astype(np.uint64)
    if kinds[:2] == ["rn", "satfinite"] and kinds[2] in _FP8:
        high, low = (_rounded(each, _FP8[kinds[2]]) for each in operands)
        return high << np.uint64(8) | low
    if kinds[0] == "rn" and kinds[-1] == "f32" and kinds[1] in _HALVES:
        high, low = (_rounded(each, _HALVES[kinds[1]]) for each in operands)
        return high << np.uint64(16) | low
    if kinds[:2] == ["rn", "f16x2"] and kinds[2] in _FP8:
        codes = operands[0].astype(np.uint16)
        halves = [(codes >> shift).astype(np.uint8) for shift in (8, 0)]
        numbers = [torch.from_numpy(half).view(_FP8[kinds[2]]).to(torch.float16) for half in halves]
        high, low = (each.view(torch.int16).numpy().astype(np.uint16) for each in numbers)
        return high.astype(np.uint64) << np.uint64(16) | low.astype(np.uint64)
    raise NotImplementedError(f"cvt.{'.'.join(kinds)}")


def _rounded(bits: Array, dtype: torch.dtype) -> Array:
    """The bits of the nearest numbers of a dtype; fp8 saturates, infinities too."""
    value = torch.from_numpy(float_of(bits).copy())
    if dtype in _FP8.values():
        value = value.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    integers = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.uint16)}[dtype.itemsize]
    return value.to(dtype).view(integers[0]).numpy().astype(integers[1]).astype(np.uint64)
