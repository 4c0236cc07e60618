"""The Triton kernel: one tile of a strided copy per program.

Imported at the first launch, so that importing the package needs no triton.
"""

import triton
import triton.language as tl

# Sizes and strides change from call to call; what the generated code depends on is constexpr. Only
# the strides that may be 1 are left to Triton's own specialisation: 1 makes an access contiguous.
_RUN_TIME = [
    "num_rows",
    "num_columns",
    "dst_row_stride",
    "outer0",
    "dst0_stride",
    "src0_stride",
    "outer1",
    "dst1_stride",
    "src1_stride",
    "outer2",
    "dst2_stride",
    "src2_stride",
]


@triton.jit(do_not_specialize=_RUN_TIME)
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
    column_blocks = tl.cdiv(column_limit, BLOCK_COLUMNS).to(tl.int32)
    row_blocks = tl.cdiv(row_limit, BLOCK_ROWS).to(tl.int32)
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
