"""The arithmetic of PTX on arrays of 64 bits, for ptx_machine.py.

An operation takes the kinds of its instruction (`mad.wide.s32` is "mad" with ["wide", "s32"]) and
its operands' bits; what lies above the width of the result is for the caller to cut off.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


def number(value: int) -> Array:
    return np.array([[value % 2**64]], dtype=np.uint64)


def _typed(kind: str, value: Array) -> Array:
    """The number that these bits are as `s32`, `u64`, ..: 64 bits wide."""
    narrow = value.astype(f"u{int(kind[1:]) // 8}")
    if kind[0] == "s":
        return narrow.view(narrow.dtype.str.replace("u", "i")).astype(np.int64)
    return narrow.astype(np.uint64)


def _product(kinds: list[str], a: Array, b: Array) -> Array:
    if kinds[0] == "wide":
        a, b = (_typed(kinds[1], each).astype(np.uint64) for each in (a, b))
    return a * b


def _quotient(kinds: list[str], a: Array, b: Array) -> Array:
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
    if kinds[0] == "s32":
        sign = np.uint64(1) << (length - np.uint64(1))
        field = (field ^ sign) - sign
    return field


def _permuted_bytes(kinds: list[str], a: Array, b: Array, selector: Array) -> Array:
    both, result = a | b << np.uint64(32), number(0)
    for i in range(4):
        choice = (selector >> np.uint64(4 * i)) & np.uint64(15)
        if (choice > 7).any():
            raise NotImplementedError("prmt that copies a sign")
        byte = (both >> (choice * np.uint64(8))) & np.uint64(255)
        result = result | byte << np.uint64(8 * i)
    return result


def _compared(kinds: list[str], a: Array, b: Array) -> Array:
    kind = kinds[1].replace("b", "u")
    return getattr(operator, kinds[0])(_typed(kind, a), _typed(kind, b))


OPERATIONS: dict[str, Callable[..., Array]] = {
    "mov": lambda kinds, a: a,
    "ld": lambda kinds, a: a,  # a parameter
    "cvt": lambda kinds, a: _typed(kinds[1], a),
    "neg": lambda kinds, a: number(0) - a,
    "not": lambda kinds, a: ~a,
    "add": lambda kinds, a, b: a + b,
    "sub": lambda kinds, a, b: a - b,
    "mul": _product,
    "mad": lambda kinds, a, b, c: _product(kinds, a, b) + c,
    "div": _quotient,
    "rem": lambda kinds, a, b: a - _quotient(kinds, a, b).astype(np.uint64) * b,
    "min": lambda kinds, a, b: np.minimum(_typed(kinds[0], a), _typed(kinds[0], b)),
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
