"""The Triton kernel, which copies one tile per program, and its launcher.

One launch copies one pair of tensors or several. This module is imported at the first launch, so
the package can be imported without triton.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .loading import loading
from .plan import ACCESS_BYTES, MAX_OUTER, coalesce, plan_copy

# The number of pairs of one launch. Each pair is a branch of the code, compiled for its layout.
MAX_PAIRS = 8
_ELEMENT_DTYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Shape, strides of dst and src, bytes of an element, and how far the addresses of dst and src are
# from the alignment of the widest access.
Layout: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int, int, int]


# The bodies call builtins only and no `tl.cdiv`: whether such a function is compiled or interpreted
# was decided when triton was imported.
@triton.jit
def tile_copy(dsts, srcs, numbers, TILES: tl.constexpr):
    """Copies one `BLOCK_ROWS x BLOCK_COLUMNS` tile: `dst[o, r, c] = src[o, r, c]` for any strides.

    `dsts`, `srcs`, `numbers` and `TILES` have an entry for each pair. The programs of the first
    pair come first, then those of the second; a pair's numbers are, each as `_encoded`: programs,
    rows, columns, dst's row and column stride, src's row and column stride, and for each outer dim
    its size and its strides in dst and src. Its tile is `VECTOR, TRANSPOSED, BLOCK_ROWS,
    BLOCK_COLUMNS` and which of dst's column, src's row and src's column stride is 1.

    Elements are integers of 1 to 8 bytes. Every stride other than a unit stride, and every size
    along a unit stride, is given in multiples of `VECTOR` elements (16 bytes where the tensors
    allow it), which is how the compiler learns that an access of `VECTOR` elements is aligned.
    Where `TRANSPOSED`, rows are the contiguous dim of `src` and columns that of `dst`: the compiler
    loads the tile along rows, exchanges it through shared memory and stores it along columns.

    Example, checked by hand: packing `[s=2, H=4, D=2]` int64 for P = 2 ranks copies, for each rank
    p, s = 2 rows of h*D = 4 columns; rows of src are H*D = 8 apart, rows of dst h*D = 4, and rank
    p's part begins at 4*p in src and at 8*p in dst. With VECTOR = 2 that is 2 programs, 2 rows, 2
    columns, row strides 2 and 4, and one outer dim of size 2 with strides 4 and 2. For p = 1, row
    1, column 3 it reads 1*(2*2) + 1*(4*2) + 3 = 15 and writes 1*(4*2) + 1*(2*2) + 3 = 15: the last
    element of both.
    """
    program = tl.program_id(0)
    if len(dsts) == 1:
        _copy_tile(program, dsts[0], srcs[0], numbers[0], TILES, 0)
    else:
        for pair in tl.static_range(len(dsts)):
            num_programs = _decoded(numbers[pair][0]).to(tl.int32)
            if (program >= 0) & (program < num_programs):
                _copy_tile(program, dsts[pair], srcs[pair], numbers[pair], TILES, pair)
            program -= num_programs


@triton.jit
def _copy_tile(program, dst, src, numbers, TILES: tl.constexpr, PAIR: tl.constexpr):
    """A tile of one pair; `program` counts from the pair's first."""
    VECTOR: tl.constexpr = TILES[PAIR][0]
    TRANSPOSED: tl.constexpr = TILES[PAIR][1]
    BLOCK_ROWS: tl.constexpr = TILES[PAIR][2]
    BLOCK_COLUMNS: tl.constexpr = TILES[PAIR][3]
    # Which of the tile's two strides in src is the unit stride, given in elements.
    SRC_ROW_VECTOR: tl.constexpr = 1 if TRANSPOSED else VECTOR
    SRC_COLUMN_VECTOR: tl.constexpr = VECTOR if TRANSPOSED else 1

    # A stride that is 1 as a constant is what makes an access contiguous.
    dst_row_stride = _decoded(numbers[3])
    dst_column_stride = 1 if TILES[PAIR][4] else _decoded(numbers[4])
    src_row_stride = 1 if TILES[PAIR][5] else _decoded(numbers[5])
    src_column_stride = 1 if TILES[PAIR][6] else _decoded(numbers[6])

    # 64 bits from the first multiplication on: tensors may hold more than 2**31 elements.
    # Along src's unit stride the size, too, comes in multiples of VECTOR.
    row_limit = _decoded(numbers[1]) * SRC_COLUMN_VECTOR
    column_limit = _decoded(numbers[2]) * VECTOR

    # Scalar arithmetic, once per program: column blocks are the fastest, so that neighbouring
    # programs write neighbouring memory. No thread divides.
    column_blocks = ((column_limit + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS).to(tl.int32)
    row_blocks = ((row_limit + BLOCK_ROWS - 1) // BLOCK_ROWS).to(tl.int32)
    column_block = program % column_blocks
    program = program // column_blocks
    row_block = program % row_blocks
    program = program // row_blocks
    for outer in tl.static_range(7, len(numbers), 3):
        size = _decoded(numbers[outer]).to(tl.int32)
        index = (program % size).to(tl.int64)
        program = program // size
        dst += index * _decoded(numbers[outer + 1]) * VECTOR
        src += index * _decoded(numbers[outer + 2]) * VECTOR

    rows = row_block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    columns = column_block.to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    mask = (rows < row_limit) & (columns < column_limit)
    src_rows = rows * src_row_stride * SRC_ROW_VECTOR
    src_columns = columns * src_column_stride * SRC_COLUMN_VECTOR
    dst_offsets = rows * dst_row_stride * VECTOR + columns * dst_column_stride
    tl.store(dst + dst_offsets, tl.load(src + src_rows + src_columns, mask=mask), mask=mask)


@triton.jit
def _decoded(number):
    return ((number >> 1) - 1).to(tl.int64)


def _encoded(number: int) -> int:
    """Returns an odd number that is not 1.

    Triton compiles again for integers in a tuple that are 1 or multiples of 16. Sizes and strides
    change from call to call, but only the tiles may select the code.
    """
    return 2 * number + 3


def launch_tile_copies(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copies each src into its dst; checks nothing.

    The two tensors of a pair have one shape and dtype. All tensors are on one device, and no dst
    shares memory with another pair. Up to `MAX_PAIRS` pairs take one launch. They take more
    launches if a pair has more than `MAX_OUTER + 2` dims that do not merge, or if there are more
    than 2**31 tiles.
    """
    pairs = [pair for pair in pairs if pair[0].numel()]
    for first in range(0, len(pairs), MAX_PAIRS):
        _launch(pairs[first : first + MAX_PAIRS])


def _launch(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    launch = _plan_launch(*[_layout(dst, src) for dst, src in pairs])
    if launch is None and len(pairs) > 1:
        for pair in pairs:
            _launch([pair])
        return
    if launch is None:
        dst, src = pairs[0]
        dim = min((size, dim) for dim, size in enumerate(dst.shape) if size > 1)[1]
        launch_tile_copies(list(zip(dst.unbind(dim), src.unbind(dim), strict=True)))
        return
    device = pairs[0][0].device.index
    kernel = launch.kernels.get(device)
    with torch.accelerator.device_index(device):  # None, on the CPU: no change
        if kernel is None:
            with loading:
                launch.kernels[device] = tile_copy[launch.grid](
                    tuple(map(triton.reinterpret, (dst for dst, _ in pairs), launch.elements)),
                    tuple(map(triton.reinterpret, (src for _, src in pairs), launch.elements)),
                    launch.numbers,
                    TILES=launch.tiles,
                    num_warps=plan.NUM_WARPS,
                    enable_fp_fusion=False,  # triton 3.9 warns if this is not set
                )
        else:
            kernel[launch.grid](
                tuple([dst.data_ptr() for dst, _ in pairs]),
                tuple([src.data_ptr() for _, src in pairs]),
                launch.numbers,
                launch.tiles,
            )


def _layout(dst: Tensor, src: Tensor) -> Layout:
    addresses = dst.data_ptr() % ACCESS_BYTES, src.data_ptr() % ACCESS_BYTES
    return dst.shape, dst.stride(), src.stride(), dst.element_size(), *addresses


class Launch(NamedTuple):
    """The arguments of one launch of `tile_copy`, without the tensors.

    `kernels` has the compiled kernel of each device on which the launch was made before. Triton
    specialises only on what the layouts contain. So a later launch calls the compiled kernel
    directly: the search for it by the arguments takes longer than the launch. Interpreted code has
    no compiled kernel.
    """

    grid: tuple[int, int, int]
    elements: tuple[torch.dtype, ...]
    numbers: tuple[tuple[int, ...], ...]
    tiles: tuple[tuple[int, ...], ...]
    kernels: dict[int | None, Any]


# Planning takes longer than a launch, and a model copies the same few layouts again and again. The
# plan depends on its integers only, so a cached plan stays correct.
@functools.lru_cache(maxsize=256)
def _plan_launch(*layouts: Layout) -> Launch | None:
    """Returns the launch that copies pairs of these layouts; None if one launch is not enough."""
    num_programs = 0
    elements, numbers, tiles = [], [], []
    for shape, dst_strides, src_strides, itemsize, *addresses in layouts:
        dims, run = coalesce(shape, dst_strides, src_strides, itemsize)
        if len(dims) > MAX_OUTER + 1:
            return None
        copy = plan_copy(dims, run, addresses[0] | addresses[1])
        num_programs += copy.num_programs
        elements.append(_ELEMENT_DTYPES[copy.element_bytes])
        unit_strides = (copy.columns[1], copy.rows[2], copy.columns[2])
        plain = [copy.num_programs, copy.rows[0], copy.columns[0], copy.rows[1], *unit_strides]
        plain += [number for dim in copy.outer for number in dim]
        numbers.append(tuple(map(_encoded, plain)))
        tile = (copy.vector, copy.transposed, copy.block_rows, copy.block_columns)
        tiles.append(tile + tuple(stride == 1 for stride in unit_strides))
    if num_programs >= 2**31:
        return None
    return Launch((num_programs, 1, 1), tuple(elements), tuple(numbers), tuple(tiles), {})
