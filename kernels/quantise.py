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
CHUNK_ELEMENTS = 1 << 17


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
    for parts in _chunks([dst, payload, scales]):
        _dequantise(*parts)


def _chunks(tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Divides tensors of the same rows into parts of about `CHUNK_ELEMENTS`, on the CPU."""
    if not tensors[0].numel():
        return
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
    # The bits of magnitudes are in the order of magnitudes; integers are compared faster.
    bits = values.view(torch.int32).bitwise_and(0x7FFFFFFF)
    magnitude = bits.amax(-1, keepdim=True).view(torch.float32)
    is_finite = None
    if not (src.is_cpu and math.isfinite(magnitude.max())):
        is_finite = values.isfinite()
        magnitude = values.abs().where(is_finite, 0.0).amax(-1, keepdim=True)
    scale = (magnitude / torch.finfo(payload.dtype).max).clamp_(min=SMALLEST_SCALE)
    scales.copy_(scale)
    quotients = torch.div(values, scale, out=bits.view(torch.float32))
    if seeds is not None:
        quotients = _rounded_at_random(quotients, payload.dtype, seeds)
    payload.copy_(quotients if is_finite is None else quotients.where(is_finite, torch.nan))


def _dequantise(dst: Tensor, payload: Tensor, scales: Tensor) -> None:
    values, factor = _widened(payload)
    dst.copy_(values.mul_(scales * factor))


def _widened(payload: Tensor) -> tuple[Tensor, float]:
    """Returns the numbers as float32, divided by a power of 2, and this power.

    torch converts e4m3fn one by one. A float16 with the same bits has the same value over 256, as
    its exponent has one bit more.
    """
    if payload.dtype is torch.float8_e5m2:
        bits = payload.view(torch.uint8).to(torch.int16).mul_(256)
        return bits.view(torch.float16).to(torch.float32), 1.0
    if payload.view(torch.int8).amax() == 127 or payload.view(torch.uint8).amax() == 255:
        return payload.to(torch.float32), 1.0  # it has a NaN, for which float16 has other bits
    bits = payload.view(torch.int8).to(torch.int16).mul_(128).bitwise_and_(-16385)
    return bits.view(torch.float16).to(torch.float32), 256.0


def _rounded_at_random(quotients: Tensor, format_: torch.dtype, seeds: Tensor) -> Tensor:
    """Rounds each number to one of its two neighbours in `format_`, the nearer one more often.

    Random bits are added below the last bit that the format keeps, and what is below is cut off.
    Numbers below the smallest normal one have one step for all; adding that number to them gives
    float32 the same step.
    """
    info = torch.finfo(format_)
    dropped = 23 - int(-math.log2(info.eps))
    magnitudes = quotients.abs().clamp_(max=info.max)
    smallest = int(127 + math.log2(info.smallest_normal)) << 23  # its bits as float32
    is_small = (magnitudes.view(torch.int32) - smallest).bitwise_right_shift_(31)  # all bits, or 0
    offsets = is_small.bitwise_and_(smallest).view(torch.float32)
    bits = magnitudes.add_(offsets).view(torch.int32)
    bits += _random_bits(seeds, quotients.shape[-1], dropped)
    bits &= -(1 << dropped)
    return bits.view(torch.float32).sub_(offsets).copysign_(quotients)


def _random_bits(seeds: Tensor, num_columns: int, num_bits: int) -> Tensor:
    """Returns random numbers of `num_bits` bits: the upper ones of MurmurHash3's last mixing step.

    The first of its three shifts is done for rows and columns before they are put together.

    Source: https://github.com/aappleby/smhasher, `fmix32`
    """
    columns = torch.arange(num_columns, device=seeds.device) * 0x9E3779B9
    rows_and_columns = [each & 0xFFFFFFFF for each in (seeds.to(torch.int64), columns)]
    rows, columns = ((each ^ (each >> 16)).to(torch.int32) for each in rows_and_columns)
    bits = (rows ^ columns).mul_(0x85EBCA6B - (1 << 32))
    bits ^= (bits >> 13).bitwise_and_((1 << 19) - 1)  # integers shift their sign in
    bits *= 0xC2B2AE35 - (1 << 32)
    bits ^= (bits >> 16).bitwise_and_((1 << 16) - 1)
    return bits.bitwise_right_shift_(32 - num_bits).bitwise_and_((1 << num_bits) - 1)
