"""The arithmetic of PTX on arrays of 64 bits, for ptx_machine.py.

An operation takes the kinds of its instruction (`mad.wide.s32` is "mad" with ["wide", "s32"]) and
its operands' bits; what lies above the width of the result is for the caller to cut off.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from ptx_floats import compared_floats, converted_floats, of_floats

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


def number(value: int) -> Array:
    return np.array([[value % 2**64]], dtype=np.uint64)


# As many bits of a number, the number, and the number 64 bits wide.
_DTYPES = {
    f"{sign}{bits}": tuple(map(np.dtype, (f"u{bits // 8}", f"{letter}{bits // 8}", f"{letter}8")))
    for sign, letter in (("s", "i"), ("u", "u"))
    for bits in (8, 16, 32, 64)
}


def _typed(kind: str, value: Array) -> Array:
    """The number that these bits are as `s32`, `u64`, ..: 64 bits wide."""
    narrow, typed, wide = _DTYPES[kind]
    return value.astype(narrow, copy=False).view(typed).astype(wide, copy=False)


def _product(kinds: list[str], a: Array, b: Array) -> Array:
    if kinds[-1] == "f32":
        return of_floats(np.multiply, a, b)
    if kinds[0] == "wide":
        a, b = (_typed(kinds[1], each).astype(np.uint64) for each in (a, b))
    return a * b


def _quotient(kinds: list[str], a: Array, b: Array) -> Array:
    if kinds == ["rn", "f32"]:  # no other one of floats is exact
        return of_floats(np.divide, a, b)
    a, b = (_typed(kinds[0], each) for each in (a, b))
    if (a < 0).any() or (b <= 0).any():
        raise NotImplementedError("a division of negative numbers or by 0")
    return a // b


def _shifted_right(kinds: list[str], a: Array, b: Array) -> Array:
    a = _typed(kinds[0].replace("b", "u"), a)
    return a >> np.minimum(b, np.uint64(63)).astype(a.dtype)


def _funnel_shifted(kinds: list[str], low: Array, high: Array, amount: Array) -> Array:
    """`shf.l`: the upper half of 64 bits shifted to the left."""
    both = (low | high << np.uint64(32)) << (amount & np.uint64(31))
    if kinds[0] != "l":
        raise NotImplementedError("shf.r")
    return both >> np.uint64(32)


def _bit_field(kinds: list[str], a: Array, start: Array, length: Array) -> Array:
    field = (a >> start) & ((np.uint64(1) << length) - np.uint64(1))
    if kinds[0].startswith("s"):
        sign = np.uint64(1) << (length - np.uint64(1))
        field = (field ^ sign) - sign
    return field


def _permuted_bytes(kinds: list[str], a: Array, b: Array, selector: Array) -> Array:
    both, result = a | b << np.uint64(32), number(0)
    for i in range(4):
        choice = (selector >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> ((choice & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        byte = np.where(choice > 7, (byte >> np.uint64(7)) * np.uint64(255), byte)  # its sign
        result = result | byte << np.uint64(8 * i)
    return result


def _compared(kinds: list[str], a: Array, b: Array) -> Array:
    if kinds[1] == "f32":
        return compared_floats(kinds[0], a, b)
    kind = kinds[1].replace("b", "u")
    return getattr(operator, kinds[0])(_typed(kind, a), _typed(kind, b))


def _sum(kinds: list[str], a: Array, b: Array) -> Array:
    return of_floats(np.add, a, b) if kinds[-1] == "f32" else a + b


def _extreme(of_numbers: Any, of_integers: Any, kinds: list[str], a: Array, b: Array) -> Array:
    """Of a number and a NaN, PTX takes the number."""
    if kinds[0] == "f32":
        return of_floats(of_numbers, a, b)
    return of_integers(_typed(kinds[0], a), _typed(kinds[0], b))


def _converted(kinds: list[str], *operands: Array) -> Array:
    if "f" in "".join(kinds) or "x2" in "".join(kinds):
        return converted_floats(kinds, *operands)
    return _typed(kinds[1], *operands)


OPERATIONS: dict[str, Callable[..., Array]] = {
    "mov": lambda kinds, a: a,
    "ld": lambda kinds, a: a,  # a parameter
    "cvt": _converted,
    "neg": lambda kinds, a: a ^ number(1 << 31) if kinds[0] == "f32" else number(0) - a,
    "abs": lambda kinds, a: of_floats(np.abs, a),
    "not": lambda kinds, a: ~a,
    "add": lambda kinds, a, b: _sum(kinds, a, b),
    "sub": lambda kinds, a, b: _sum(kinds, a, b ^ number(1 << 31) if kinds[-1] == "f32" else -b),
    "mul": _product,
    "mad": lambda kinds, a, b, c: _product(kinds, a, b) + c,
    "div": _quotient,
    "rem": lambda kinds, a, b: a - _quotient(kinds, a, b).astype(np.uint64) * b,
    "min": lambda kinds, a, b: _extreme(np.fmin, np.minimum, kinds, a, b),
    "max": lambda kinds, a, b: _extreme(np.fmax, np.maximum, kinds, a, b),
    "and": lambda kinds, a, b: a & b,
    "or": lambda kinds, a, b: a | b,
    "xor": lambda kinds, a, b: a ^ b,
    "shl": lambda kinds, a, b: np.where(b < 64, a << np.minimum(b, np.uint64(63)), np.uint64(0)),
    "shr": _shifted_right,
    "shf": _funnel_shifted,
    "bfe": _bit_field,
    "prmt": _permuted_bytes,
    "selp": lambda kinds, a, b, p: np.where(p != 0, a, b),
    "setp": _compared,
}
