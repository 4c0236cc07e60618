"""Rows of fp8 with one scale each: `quantise_` writes them, `dequantise_` reads them.

A row is the last dim. Its scale is its largest finite magnitude over the largest number of the fp8
format, in float32, and each element travels as the fp8 number nearest to element / scale. All
divisions and products are exact float32 ones, so every implementation gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .strided_copy import Implementation, require_triton, triton_runs

# The formats of a row. The size of a row is a multiple of 16: its bytes are then a multiple of the
# widest access of a thread.
FORMATS = (torch.float8_e4m3fn, torch.float8_e5m2)
ROW_MULTIPLE = 16
# Scales are at least the smallest normal float32: a smaller one would have few bits of its own, and
# a row of zeros would divide by zero.
SMALLEST_SCALE = 2.0**-126
# torch's twins work on so many elements at a time, so that what they compute stays in the cache.
CHUNK_ELEMENTS = 1 << 16


def quantise_(
    payload: Tensor,
    scales: Tensor,
    src: Tensor,
    seeds: Tensor | None = None,
    *,
    impl: Implementation = "auto",
) -> None:
    """Writes the rows of `src` as fp8 numbers and one scale a row, with any strides on all sides.

    Infinities and NaNs become NaN, and do not count for the scale of their row.

    Example:
        >>> import torch
        >>> payload, scales = torch.empty(16, dtype=torch.float8_e4m3fn), torch.empty(1)
        >>> quantise_(payload, scales, torch.arange(16.0))
        >>> (payload.float() * scales)[-4:]
        tensor([11.7857, 12.8571, 13.9286, 15.0000])

    Args:
        payload: `[.., D]` of one of `FORMATS`, to write.
        scales: `[.., 1]` float32, to write.
        src: `[.., D]` float16, bfloat16 or float32.
        seeds: `[.., 1]` int32, random. Then each element is rounded up or down at random, so that
            its expectation is its value. None: to the nearest, ties to even.
        impl: as for `strided_copy_`.
    """
    if triton_runs(impl, (src,)):
        require_triton(src)
        from .quantise_rows import launch_quantise

        launch_quantise(payload, scales, src, seeds, SMALLEST_SCALE)
        return
    for parts in _chunks([payload, scales, src, *([] if seeds is None else [seeds])]):
        _quantise(*parts)


def dequantise_(
    dst: Tensor, payload: Tensor, scales: Tensor, *, impl: Implementation = "auto"
) -> None:
    """Writes payload * scale, rounded to the dtype of `dst`, with any strides on all sides.

    Example:
        >>> import torch
        >>> dst = torch.empty(1, 2, dtype=torch.bfloat16)
        >>> payload = torch.tensor([[1.0, -448.0]]).to(torch.float8_e4m3fn)
        >>> dequantise_(dst, payload, torch.tensor([[0.5]]))
        >>> dst
        tensor([[   0.5000, -224.0000]], dtype=torch.bfloat16)
    """
    if triton_runs(impl, (dst,)):
        require_triton(dst)
        from .quantise_rows import launch_dequantise

        launch_dequantise(dst, payload, scales)
        return
    for to, numbers, factors in _chunks([dst, payload, scales]):
        to.copy_(numbers.to(torch.float32) * factors)


def _chunks(tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Divides tensors of the same rows into parts of about `CHUNK_ELEMENTS`, on the CPU."""
    *rows, columns = tensors[0].shape
    num_rows = max(1, CHUNK_ELEMENTS // columns)
    if math.prod(rows) <= num_rows or not tensors[0].is_cpu:
        yield tensors
        return
    dim = max(range(len(rows)), key=rows.__getitem__)
    length = max(1, num_rows * rows[dim] // math.prod(rows))
    for parts in zip(*[tensor.split(length, dim) for tensor in tensors], strict=True):
        yield from _chunks(parts)


def _quantise(payload: Tensor, scales: Tensor, src: Tensor, seeds: Tensor | None = None) -> None:
    values = src.to(torch.float32)
    is_finite = values.isfinite()
    largest = torch.finfo(payload.dtype).max
    magnitude = values.abs().where(is_finite, 0.0).amax(-1, keepdim=True)
    scale = (magnitude / largest).clamp_(min=SMALLEST_SCALE)
    scales.copy_(scale)
    quotients = values / scale
    if seeds is not None:
        quotients = _rounded_at_random(quotients, payload.dtype, seeds)
    payload.copy_(quotients.where(is_finite, torch.nan))


def _rounded_at_random(quotients: Tensor, format_: torch.dtype, seeds: Tensor) -> Tensor:
    """Rounds each number to one of its two neighbours in `format_`, the nearer one more often.

    Random bits are added below the last bit that the format keeps, and what is below is cut off.
    Numbers below the smallest normal one have one step for all; adding that number to them gives
    float32 the same step.
    """
    info = torch.finfo(format_)
    dropped = 23 - int(-math.log2(info.eps))
    magnitudes = quotients.abs().clamp_(max=info.max)
    offsets = (magnitudes < info.smallest_normal) * info.smallest_normal
    bits = (magnitudes + offsets).view(torch.int32)
    bits += _random_bits(seeds, quotients.shape[-1]) >> (32 - dropped)
    bits &= -(1 << dropped)
    return (bits.view(torch.float32) - offsets).copysign(quotients)


def _random_bits(seeds: Tensor, num_columns: int) -> Tensor:
    """Returns 32 random bits for each column of each row: the last mixing step of MurmurHash3.

    Source: https://github.com/aappleby/smhasher, `fmix32`
    """
    columns = torch.arange(num_columns, device=seeds.device) * 0x9E3779B9
    bits = (seeds.to(torch.int64) ^ columns) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    return bits ^ (bits >> 16)
