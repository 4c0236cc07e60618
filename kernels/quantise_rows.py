"""The Triton kernels of fp8 rows, which take a tile of rows per program, and their launcher.

This module is imported at the first launch, so the package can be imported without triton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .loading import loading
from .plan import ACCESS_BYTES, NUM_WARPS, ROWS_TILE_ELEMENTS
from .tile_copy import _decoded, _encoded

# From this compute capability on, NVIDIA GPUs have instructions that convert to and from fp8.
_CONVERTING_CAPABILITY = 89


@triton.jit
def quantise_rows(
    payload,
    scales,
    src,
    seeds,
    numbers,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTORS: tl.constexpr,
    FORMAT: tl.constexpr,
    HAS_SEEDS: tl.constexpr,
    CONVERTS: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
):
    """Quantises a tile of `BLOCK[0]` rows: `payload[r, c] = fp8(src[r, c] / scales[r])`.

    `numbers` are those of `_numbers` for payload, scales, src and seeds. `VECTORS` are, for payload
    and src, the elements that a stride is a multiple of, and whether the column stride is 1.
    `FORMAT` is what `_format_of` returns. Where it `CONVERTS`, an instruction rounds to the
    nearest; elsewhere, and at random, integer arithmetic does.

    Example, checked by hand: a row 1, -3, 448, .. in e4m3 has the scale 448 / 448 = 1, and its
    payload is 0x38 (exponent 7 - 7, mantissa 0), 0xC4 (sign, exponent 8 - 7, mantissa 4 of 8) and
    0x7E (exponent 15 - 7, mantissa 6 of 8).
    """
    LARGEST: tl.constexpr = FORMAT[0]
    SMALLEST_NORMAL: tl.constexpr = FORMAT[1]
    DROPPED: tl.constexpr = FORMAT[2]
    SMALLEST_STEP: tl.constexpr = FORMAT[3]
    EXPONENT: tl.constexpr = FORMAT[4]
    ROUNDING: tl.constexpr = FORMAT[5]
    rows, row_mask, payload_start, scales_start, src_start, seeds_start = _tile_of_4(
        numbers, BLOCK, VECTORS
    )
    columns = tl.arange(0, BLOCK[1])
    mask = row_mask[:, None] & (columns < COLUMNS)[None, :]
    src_column = 1 if VECTORS[3] else _decoded(numbers[8])
    src_offsets = (rows * _decoded(numbers[4]) * VECTORS[2])[:, None] + columns[
        None, :
    ] * src_column
    values = tl.load(src + src_start + src_offsets, mask=mask, other=0.0).to(tl.float32)

    is_finite = tl.abs(values) < float("inf")  # false for NaN
    # Not `tl.max`: whether that is compiled or interpreted was decided when triton was imported.
    finite = tl.where(is_finite, tl.abs(values), 0.0)
    magnitude = tl.reduce(finite, 1, tl.standard._elementwise_max)
    scale = tl.maximum(tl.div_rn(magnitude, LARGEST), SMALLEST_SCALE)
    tl.store(scales + scales_start + rows * _decoded(numbers[3]), scale, mask=row_mask)
    quotients = tl.div_rn(values, scale[:, None])

    if CONVERTS and not HAS_SEEDS:
        if DROPPED == 20:
            codes = quotients.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            codes = quotients.to(tl.float8e5).to(tl.uint8, bitcast=True)
    else:
        magnitudes = tl.minimum(tl.abs(quotients), LARGEST)
        is_small = magnitudes < SMALLEST_NORMAL
        if HAS_SEEDS:
            # Adding the smallest normal number gives numbers below it the step of the format.
            offsets = tl.where(is_small, SMALLEST_NORMAL, 0.0)
            bits = (magnitudes + offsets).to(tl.int32, bitcast=True)
            row_seeds = tl.load(
                seeds + seeds_start + rows * _decoded(numbers[5]), mask=row_mask, other=0
            )
            bits += (_random_bits(row_seeds, columns) >> (32 - DROPPED)).to(tl.int32)
            rounded = ((bits >> DROPPED) << DROPPED).to(tl.float32, bitcast=True) - offsets
        else:
            # A float32 sum with this number has the step of the format, and rounds to the nearest.
            below = (magnitudes + ROUNDING) - ROUNDING
            bits = magnitudes.to(tl.int32, bitcast=True)
            bits += (1 << (DROPPED - 1)) - 1 + ((bits >> DROPPED) & 1)
            above = ((bits >> DROPPED) << DROPPED).to(tl.float32, bitcast=True)
            rounded = tl.where(is_small, below, above)
        normal = (rounded.to(tl.int32, bitcast=True) >> DROPPED) - EXPONENT
        subnormal = (tl.minimum(rounded, SMALLEST_NORMAL) * (1.0 / SMALLEST_STEP)).to(tl.int32)
        signs = (quotients.to(tl.int32, bitcast=True) >> 24) & 0x80
        codes = (tl.where(rounded < SMALLEST_NORMAL, subnormal, normal) | signs).to(tl.uint8)
    codes = tl.where(is_finite, codes, 0x7F).to(tl.uint8)
    payload_column = 1 if VECTORS[1] else _decoded(numbers[6])
    payload_offsets = (rows * _decoded(numbers[2]) * VECTORS[0])[:, None]
    payload_offsets += columns[None, :] * payload_column
    tl.store(payload + payload_start + payload_offsets, codes, mask=mask)


@triton.jit
def dequantise_rows(
    dst,
    scales,
    payload,
    numbers,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTORS: tl.constexpr,
    FORMAT: tl.constexpr,
    CONVERTS: tl.constexpr,
):
    """Reads a tile of rows that `quantise_rows` wrote: `dst[r, c] = payload[r, c] * scales[r]`.

    The arguments are those of `quantise_rows`, with dst and payload in the places of payload and
    src, and the scales once more in the place of the seeds.
    """
    DROPPED: tl.constexpr = FORMAT[2]
    EXPONENT: tl.constexpr = FORMAT[4]
    LARGEST_CODE: tl.constexpr = FORMAT[6]
    rows, row_mask, dst_start, scales_start, payload_start, _ = _tile_of_4(numbers, BLOCK, VECTORS)
    columns = tl.arange(0, BLOCK[1])
    mask = row_mask[:, None] & (columns < COLUMNS)[None, :]
    payload_column = 1 if VECTORS[3] else _decoded(numbers[8])
    payload_offsets = (rows * _decoded(numbers[4]) * VECTORS[2])[:, None]
    payload_offsets += columns[None, :] * payload_column
    codes = tl.load(payload + payload_start + payload_offsets, mask=mask, other=0)
    scale = tl.load(scales + scales_start + rows * _decoded(numbers[3]), mask=row_mask, other=0.0)
    if CONVERTS:
        if DROPPED == 20:
            values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            values = codes.to(tl.float8e5, bitcast=True).to(tl.float32)
    else:
        # The bits of the format are those of a float32 whose exponent is too small by a constant.
        bits = codes.to(tl.int32)
        magnitudes = ((bits & 0x7F) << DROPPED).to(tl.float32, bitcast=True)
        magnitudes *= 2.0 ** (EXPONENT >> (23 - DROPPED))
        magnitudes = tl.where((bits & 0x7F) > LARGEST_CODE, float("nan"), magnitudes)
        values = tl.where(bits > 0x7F, -magnitudes, magnitudes)
    results = (values * scale[:, None]).to(dst.dtype.element_ty)
    dst_column = 1 if VECTORS[1] else _decoded(numbers[6])
    dst_offsets = (rows * _decoded(numbers[2]) * VECTORS[0])[:, None] + columns[
        None, :
    ] * dst_column
    tl.store(dst + dst_start + dst_offsets, results, mask=mask)


@triton.jit
def _tile_of_4(numbers, BLOCK: tl.constexpr, VECTORS: tl.constexpr):
    """The rows of a program's tile, which of them exist, and where they begin in four tensors."""
    program = tl.program_id(0)
    limit = _decoded(numbers[1])
    blocks = ((limit + BLOCK[0] - 1) // BLOCK[0]).to(tl.int32)
    block = program % blocks
    program = program // blocks
    start_0 = tl.full((), 0, tl.int64)
    start_1 = tl.full((), 0, tl.int64)
    start_2 = tl.full((), 0, tl.int64)
    start_3 = tl.full((), 0, tl.int64)
    for outer in tl.static_range(10, len(numbers), 5):
        size = _decoded(numbers[outer]).to(tl.int32)
        index = (program % size).to(tl.int64)
        program = program // size
        start_0 += index * _decoded(numbers[outer + 1]) * VECTORS[0]
        start_1 += index * _decoded(numbers[outer + 2])
        start_2 += index * _decoded(numbers[outer + 3]) * VECTORS[2]
        start_3 += index * _decoded(numbers[outer + 4])
    rows = block.to(tl.int64) * BLOCK[0] + tl.arange(0, BLOCK[0])
    return rows, rows < limit, start_0, start_1, start_2, start_3


@triton.jit
def _random_bits(row_seeds, columns):
    """As `quantise._random_bits`."""
    bits = row_seeds.to(tl.uint32, bitcast=True)[:, None]
    bits ^= (columns.to(tl.uint32) * 0x9E3779B9)[None, :]
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return bits ^ (bits >> 16)


def launch_quantise(
    payload: Tensor, scales: Tensor, src: Tensor, seeds: Tensor | None, smallest_scale: float
) -> None:
    """As `quantise_`, on an accelerator; checks nothing."""
    if not payload.numel():
        return
    tensors = (payload, scales, src, scales if seeds is None else seeds)
    grid, numbers, settings = plan_rows(*tensors, payload.dtype)
    with loading, torch.accelerator.device_index(src.device.index):  # None, on the CPU: no change
        quantise_rows[grid](
            payload.view(torch.uint8),
            scales,
            src,
            tensors[3],
            numbers,
            **settings,
            HAS_SEEDS=seeds is not None,
            CONVERTS=_converts(),
            SMALLEST_SCALE=smallest_scale,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )


def launch_dequantise(dst: Tensor, payload: Tensor, scales: Tensor) -> None:
    """As `dequantise_`, on an accelerator; checks nothing."""
    if not payload.numel():
        return
    grid, numbers, settings = plan_rows(dst, scales, payload, scales, payload.dtype)
    with loading, torch.accelerator.device_index(dst.device.index):  # None, on the CPU: no change
        dequantise_rows[grid](
            dst,
            scales,
            payload.view(torch.uint8),
            numbers,
            **settings,
            CONVERTS=_converts(),
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )


def _converts() -> bool:
    """Whether the GPU has instructions for fp8; interpreted code has none."""
    if triton.knobs.runtime.interpret:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return bool(target.backend == "cuda" and target.arch >= _CONVERTING_CAPABILITY)


def plan_rows(
    written: Tensor, scales: Tensor, read: Tensor, others: Tensor, format_: torch.dtype
) -> tuple[tuple[int, int, int], tuple[int, ...], dict[str, Any]]:
    """Returns the grid, the numbers and the constants of a launch over four tensors of rows.

    The numbers are, each as `tile_copy._encoded`: programs, rows, the four row strides, the four
    column strides, and for each outer dim its size and its four strides. Strides of `written` and
    `read` come in multiples of what all of them are a multiple of, at most 16 bytes.
    """
    tensors = (written, scales, read, others)
    dims = _merged(written.shape[:-1], [tensor.stride()[:-1] for tensor in tensors])
    units = [1, 1, 1, 1]
    for place in (0, 2):
        address = tensors[place].data_ptr() % ACCESS_BYTES
        itemsize = tensors[place].element_size()
        strides = [dim[1 + place] * itemsize for dim in dims]
        units[place] = max(1, math.gcd(ACCESS_BYTES, address, *strides) // itemsize)
    dims = [
        (size, *[stride // unit for stride, unit in zip(strides, units, strict=True)])
        for size, *strides in dims
    ]
    rows = max(dims, key=lambda dim: dim[0])
    dims.remove(rows)
    columns = written.shape[-1]
    block_columns = triton.next_power_of_2(columns)
    block_rows = min(triton.next_power_of_2(rows[0]), max(1, ROWS_TILE_ELEMENTS // block_columns))
    num_programs = math.ceil(rows[0] / block_rows) * math.prod(dim[0] for dim in dims)
    column_strides = [tensor.stride(-1) for tensor in tensors]
    plain = [num_programs, rows[0], *rows[1:], *column_strides]
    plain += [number for dim in reversed(dims) for number in dim]
    vectors = (units[0], column_strides[0] == 1, units[2], column_strides[2] == 1)
    settings = {
        "COLUMNS": columns,
        "BLOCK": (block_rows, block_columns),
        "VECTORS": vectors,
        "FORMAT": format_of(format_),
    }
    return (num_programs, 1, 1), tuple(map(_encoded, plain)), settings


def format_of(dtype: torch.dtype) -> tuple[float, float, int, float, int, float, int]:
    """Returns what the kernels know of a format.

    These are its largest and its smallest normal number; how many bits fewer than float32 its
    mantissa has; its smallest step; its exponent of 1 less than that of float32, in bits that the
    format keeps; the float32 whose step is the smallest step, times 1; the code of the largest.
    """
    info = torch.finfo(dtype)
    mantissa = round(-math.log2(info.eps))
    step = info.smallest_normal * info.eps
    bias = 1 - round(math.log2(info.smallest_normal))
    largest_code = int(torch.tensor(info.max).to(dtype).view(torch.uint8))
    exponent = (127 - bias) << mantissa
    return (
        info.max,
        info.smallest_normal,
        23 - mantissa,
        step,
        exponent,
        step * 2**23,
        largest_code,
    )


def _merged(shape: Sequence[int], strides: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Merges dims that are adjacent in all tensors; returns their sizes and strides.

    Example:
        >>> _merged((2, 3, 4), [(12, 4, 1), (24, 8, 2)])  # the second in steps of 2
        [(24, 1, 2)]
    """
    dims: list[tuple[int, ...]] = [(1, *[0] * len(strides))]
    for size, *each in sorted(zip(shape, *strides, strict=True), key=lambda dim: dim[1:]):
        if size == 1:
            continue
        inner_size, *inner = dims[-1]
        if inner_size > 1 and all(a == inner_size * b for a, b in zip(each, inner, strict=True)):
            dims[-1] = (inner_size * size, *inner)
        else:
            dims.append((size, *each))
    return dims[1:] or dims
