"""The Triton kernel, one tile of a strided copy per program, and its launcher.

Imported at the first launch, so that importing the package needs no triton.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .plan import ACCESS_BYTES, MAX_OUTER, coalesce, plan_copy

_ELEMENT_DTYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Sizes and strides change from call to call; what the generated code depends on is constexpr. Only
# the strides that may be 1 are left to Triton's own specialisation: 1 makes an access contiguous.
_UNIT_STRIDES = ["dst_column_stride", "src_row_stride", "src_column_stride"]
_RUN_TIME = ["num_rows", "num_columns", "dst_row_stride"] + [
    name.format(dim)
    for dim in range(MAX_OUTER)
    for name in ("outer{}", "dst{}_stride", "src{}_stride")
]


# The body is builtins only, no `tl.cdiv`: those are compiled or interpreted as triton was imported.
@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_UNIT_STRIDES)
def tile_copy(
    dst,
    src,
    num_rows,
    num_columns,
    dst_row_stride,
    dst_column_stride,
    src_row_stride,
    src_column_stride,
    outer0,
    dst0_stride,
    src0_stride,
    outer1,
    dst1_stride,
    src1_stride,
    outer2,
    dst2_stride,
    src2_stride,
    NUM_OUTER: tl.constexpr,
    VECTOR: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Copies one `BLOCK_ROWS x BLOCK_COLUMNS` tile: `dst[o, r, c] = src[o, r, c]` for any strides.

    Elements are integers of 1 to 8 bytes. Every stride other than a unit stride, and every size
    along a unit stride, is given in multiples of `VECTOR` elements (16 bytes where the tensors
    allow it), which is how the compiler learns that an access of `VECTOR` elements is aligned.
    Where `TRANSPOSED`, rows are the contiguous dim of `src` and columns that of `dst`: the compiler
    loads the tile along rows, exchanges it through shared memory and stores it along columns.

    Example, checked by hand: packing `[s=2, H=4, D=2]` int64 for P = 2 ranks copies, for each rank
    p, s = 2 rows of h*D = 4 columns; rows of src are H*D = 8 apart, rows of dst h*D = 4, and rank
    p's part begins at 4*p in src and at 8*p in dst. With VECTOR = 2 the arguments are num_rows=2,
    num_columns=2, dst_row_stride=2, src_row_stride=4, outer0=2, dst0_stride=4, src0_stride=2. For
    p = 1, row 1, column 3 it reads 1*(2*2) + 1*(4*2) + 3 = 15 and writes 1*(4*2) + 1*(2*2) + 3 =
    15: the last element of both.
    """
    # Which of the tile's two strides in src is the unit stride, given in elements.
    SRC_ROW_VECTOR: tl.constexpr = 1 if TRANSPOSED else VECTOR
    SRC_COLUMN_VECTOR: tl.constexpr = VECTOR if TRANSPOSED else 1

    # 64 bits from the first multiplication on: tensors may hold more than 2**31 elements.
    # Along src's unit stride the size, too, comes in multiples of VECTOR.
    row_limit = num_rows.to(tl.int64) * SRC_COLUMN_VECTOR
    column_limit = num_columns.to(tl.int64) * VECTOR

    # Scalar arithmetic, once per program: column blocks are the fastest, so that neighbouring
    # programs write neighbouring memory. No thread divides.
    column_blocks = ((column_limit + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS).to(tl.int32)
    row_blocks = ((row_limit + BLOCK_ROWS - 1) // BLOCK_ROWS).to(tl.int32)
    program = tl.program_id(0)
    column_block = program % column_blocks
    program = program // column_blocks
    row_block = program % row_blocks
    program = program // row_blocks
    if NUM_OUTER > 0:
        index = (program % outer0).to(tl.int64)
        program = program // outer0
        dst += index * dst0_stride * VECTOR
        src += index * src0_stride * VECTOR
    if NUM_OUTER > 1:
        index = (program % outer1).to(tl.int64)
        program = program // outer1
        dst += index * dst1_stride * VECTOR
        src += index * src1_stride * VECTOR
    if NUM_OUTER > 2:
        index = (program % outer2).to(tl.int64)
        dst += index * dst2_stride * VECTOR
        src += index * src2_stride * VECTOR

    rows = row_block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    columns = column_block.to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    mask = (rows < row_limit) & (columns < column_limit)
    src_rows = rows * src_row_stride * SRC_ROW_VECTOR
    src_columns = columns * src_column_stride * SRC_COLUMN_VECTOR
    dst_offsets = rows * dst_row_stride * VECTOR + columns * dst_column_stride
    tl.store(dst + dst_offsets, tl.load(src + src_rows + src_columns, mask=mask), mask=mask)


def launch_tile_copy(dst: Tensor, src: Tensor) -> None:
    """Copies `src` into `dst`, which have one shape, dtype and device; nothing else is checked.

    One launch; more only for what one cannot take: more than `MAX_OUTER + 2` dims that do not
    merge, or more than 2**31 tiles.
    """
    if dst.numel() == 0:
        return
    dst_address, src_address = dst.data_ptr(), src.data_ptr()
    launch = _plan_launch(
        dst.shape,
        dst.stride(),
        src.stride(),
        dst.element_size(),
        (dst_address | src_address) % ACCESS_BYTES,
    )
    if launch is None:
        dim = min((size, dim) for dim, size in enumerate(dst.shape) if size > 1)[1]
        for dst_slice, src_slice in zip(dst.unbind(dim), src.unbind(dim), strict=True):
            launch_tile_copy(dst_slice, src_slice)
        return
    grid, element, arguments, constants = launch
    with torch.accelerator.device_index(dst.device.index):  # None, on the CPU, changes nothing
        tile_copy[grid](
            triton.reinterpret(dst, element),
            triton.reinterpret(src, element),
            *arguments,
            **constants,
        )


# Planning takes longer than a launch, and a model has a handful of layouts that it copies again and
# again. A pure function of integers: what is remembered cannot go stale.
@functools.lru_cache(maxsize=256)
def _plan_launch(
    shape: tuple[int, ...],
    dst_strides: tuple[int, ...],
    src_strides: tuple[int, ...],
    itemsize: int,
    address: int,
) -> tuple[tuple[int], torch.dtype, tuple[int, ...], dict[str, Any]] | None:
    """Grid, element type and arguments of the one launch, or None where one is not enough.

    `address` stands for both addresses: a number with the alignment of the less aligned of them.
    """
    dims, run = coalesce(shape, dst_strides, src_strides, itemsize)
    if len(dims) > MAX_OUTER + 1:
        return None
    plan = plan_copy(dims, run, address)
    if plan.num_programs >= 2**31:
        return None
    arguments = list(plan.rows[:1] + plan.columns[:1])
    for rows, columns in zip(plan.rows[1:], plan.columns[1:], strict=True):
        arguments += [rows, columns]
    for dim in plan.outer + [(1, 0, 0)] * (MAX_OUTER - len(plan.outer)):
        arguments += dim
    constants = {
        "NUM_OUTER": len(plan.outer),
        "VECTOR": plan.vector,
        "TRANSPOSED": plan.transposed,
        "BLOCK_ROWS": plan.block_rows,
        "BLOCK_COLUMNS": plan.block_columns,
    }
    return (plan.num_programs,), _ELEMENT_DTYPES[plan.element_bytes], tuple(arguments), constants
